"""Measuring restorations: image and identity metrics, paired gains over people, reports."""

from metagpen.evaluate.engine import Method, evaluate, evaluate_people
from metagpen.evaluate.folders import compare_folders
from metagpen.evaluate.metrics import degrees, identity, lpips, psnr, sharpness, ssim
from metagpen.evaluate.protocol import EvaluateConfig, run_evaluate
from metagpen.evaluate.records import Record
from metagpen.evaluate.statistics import Gain, Interval, mean_interval, paired_gain
from metagpen.lpips_files import load_lpips

__all__ = [
    "EvaluateConfig",
    "Gain",
    "Interval",
    "Method",
    "Record",
    "compare_folders",
    "degrees",
    "evaluate",
    "evaluate_people",
    "identity",
    "load_lpips",
    "lpips",
    "mean_interval",
    "paired_gain",
    "psnr",
    "run_evaluate",
    "sharpness",
    "ssim",
]
