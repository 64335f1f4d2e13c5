"""Tests and compute-sanitizer on a GPU, from the record of bench/suite.py."""

from __future__ import annotations

from bench.tables.sections import Result, Section


def check_claims(result: Result) -> list[str]:
    checks = ("tests-", "memcheck-", "racecheck-")
    ran = {name: case["status"] for name, case in result["cases"].items() if name.startswith(checks)}
    return [", ".join(f"{name} {status}" for name, status in ran.items())] if ran else []


CHECKS = Section(
    "the kernels' and the layers' tests, and compute-sanitizer on a few of them",
    lambda result: isinstance(result, dict) and result.get("benchmark") == "suite",
    (),
    lambda result: (),
    check_claims,
)
