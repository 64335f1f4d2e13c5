"""Training that is faster because its gradients are sparse."""

__version__ = "0.1.0"
