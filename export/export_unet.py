#!/usr/bin/env python
"""Writes a model's UNet with its attribution maps for ONNX Runtime or TensorRT.

    python export/export_unet.py --model testbed --out engines/testbed

The same as ``biasmap export``; see ``--help`` and export/README.md.
"""

from __future__ import annotations

import sys

from biasmap_fast.cli import main

if __name__ == "__main__":
    sys.argv.insert(1, "export")
    main()
