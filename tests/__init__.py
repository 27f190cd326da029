"""What every test and every script that a test launches finds in its environment, set before PyTorch is loaded.

One thread each, as tests run two at a time: threads that wait for one another take many times as long where something
else wants the cores.
"""

import os
from pathlib import Path

ROOT = Path(__file__).parent.parent
os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TQDM_DISABLE="1", PYTHONPATH=str(ROOT))
