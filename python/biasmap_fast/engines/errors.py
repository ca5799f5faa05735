"""What can go wrong between a UNet and its engine; every message names the remedy."""

from __future__ import annotations


class EngineError(RuntimeError):
    """An engine cannot be exported, loaded or run."""


class UnsupportedUNetError(EngineError):
    """The UNet has a part that the exported graph does not have."""


class ExportError(EngineError):
    """A step of the export failed."""


class ParityError(ExportError):
    """The exported graph does not compute what torch computes."""


class ManifestError(EngineError):
    """The folder holds no engine of this version, or its files are not those that were exported."""


class WrongModelError(EngineError):
    """The engine was exported from another model than the one it is used with."""


class ShapeError(EngineError):
    """The shape of an input is outside what the engine takes."""


class DeviceError(EngineError):
    """The runtime cannot use the device that was asked for."""


class MissingExtraError(EngineError, ImportError):
    """A package of an extra is missing or incomplete."""
