"""`Schedule` for other people's training loops: one module for each library, imported only when it is asked for."""
