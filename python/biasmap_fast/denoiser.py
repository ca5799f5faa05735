"""What any pipeline passes its denoiser."""

from __future__ import annotations

from contextvars import ContextVar

# Set while probes call the denoiser themselves: recorders and guidance ignore such calls.
probing: ContextVar[bool] = ContextVar("probing", default=False)
