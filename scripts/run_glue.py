#!/usr/bin/env python
"""Fine-tune a model on a GLUE task or on your own sentences. See --help."""

from adasam_hf.glue.run import main

if __name__ == "__main__":
    main()
