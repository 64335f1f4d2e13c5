"""Markdown tables from the result files under bench/results/, which are told apart by what they hold."""
