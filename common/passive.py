"""Imported before torch: threads that wait leave their cores to others. Those that spin make two processes side by side
many times slower; one alone is a little faster with them, which is what export.py times."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
