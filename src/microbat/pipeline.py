"""The whole job, readable top to bottom: ``quantize`` a model into a folder, ``evaluate`` folders side by side.

A run is described by a :class:`Run`, plain data that is written with the result (recipe.json) and reads back to the
same run.
"""

import dataclasses
import json
import platform
import resource
import shutil
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from microbat.calibrate import data as calibration_data
from microbat.calibrate.engine import Job, Precision, Record, calibrate, preflight
from microbat.export import folder as folders
from microbat.linear import QuantBlock
from microbat.methods.base import Method, Preparer, Quant, Solver
from microbat.models.base import Checkpoint, resolve
from microbat.quantizers.clip import Clip
from microbat.registry import pick, subclasses, unknown
from microbat.report.activations import activation_record
from microbat.scheme import Scheme

PICTURED_LAYERS = 3  # activations shown in the report
RUN_FILE, TOKENS_FILE = "run.json", "calibration.safetensors"
