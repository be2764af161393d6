"""Makes this folder's modules importable by its tests, as they are for a script that runs here."""

import os
import sys
from pathlib import Path

os.environ.setdefault("KINETO_LOG_LEVEL", "9")  # torch's profiler announces itself
sys.path.insert(0, str(Path(__file__).parent))
