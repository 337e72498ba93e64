"""The paper's own numbers, in percent as printed, to stand beside ours. Source: arXiv:2510.20579v2, tables 1, 2, 10."""

from collections.abc import Mapping
from typing import NamedTuple


class VStarRow(NamedTuple):
    """One row of the V-STaR table, in percent: accuracy, tIoU and vIoU of both chains, mAM and mLGM."""

    acc: float
    tiou_1: float
    tiou_2: float
    viou_1: float
    viou_2: float
    mam: float
    mlgm: float


OURS = "Open-o3 Video 7B"
BASE = "Qwen2.5-VL-7B"

VSTAR: Mapping[str, VStarRow] = {
    "GPT-4o": VStarRow(60.8, 16.7, 12.8, 6.5, 3.0, 26.8, 38.2),
    "Gemini-2-Flash": VStarRow(53.0, 24.5, 23.8, 4.6, 2.2, 26.9, 35.6),
    "Video-LLaMA3": VStarRow(41.9, 23.0, 23.1, 0.9, 0.2, 21.7, 27.0),
    "LLaVA-Video": VStarRow(49.5, 10.5, 12.2, 1.9, 1.3, 20.8, 27.3),
    "VideoChat2": VStarRow(36.2, 13.7, 12.5, 2.5, 1.0, 17.0, 20.3),
    "Oryx-1.5-7B": VStarRow(20.5, 13.5, 14.8, 10.1, 3.5, 15.1, 13.8),
    "InternVL-2.5-8B": VStarRow(44.2, 8.7, 7.8, 0.7, 0.1, 17.6, 24.9),
    BASE: VStarRow(33.5, 15.4, 13.8, 17.0, 2.5, 19.3, 22.4),
    "TRACE": VStarRow(17.6, 19.1, 17.1, 0.0, 0.0, 12.0, 13.3),
    "Sa2VA-8B": VStarRow(16.4, 0.1, 0.0, 32.3, 37.5, 17.1, 20.3),
    OURS: VStarRow(61.0, 24.5, 24.0, 25.4, 6.0, 33.7, 46.6),
    "Qwen3-VL-4B": VStarRow(59.6, 18.6, 19.2, 26.8, 7.7, 31.9, 43.7),
    "Open-o3 Video, Qwen3-VL-4B": VStarRow(59.7, 25.1, 23.8, 31.2, 8.1, 34.6, 47.3),
    "Qwen3-VL-8B": VStarRow(42.9, 23.5, 24.4, 27.3, 7.1, 28.0, 34.4),
    "Open-o3 Video, Qwen3-VL-8B": VStarRow(61.1, 24.9, 23.5, 33.2, 8.8, 35.5, 49.0),
    "Qwen3-VL-32B": VStarRow(47.5, 24.5, 25.7, 30.9, 7.5, 33.9, 45.6),
    "Open-o3 Video, Qwen3-VL-32B": VStarRow(64.6, 26.4, 26.0, 33.6, 11.9, 37.9, 53.7),
}

# Benchmark -> metric -> model -> percent; 64 frames. Metrics are named as our tables name them.
GENERAL: Mapping[str, Mapping[str, Mapping[str, float]]] = {
    "videomme": {
        "accuracy": {BASE: 62.4, "VideoRFT-7B": 59.8, "Video-R1-7B": 61.4, OURS: 63.6, "GPT-4o": 71.9},
        "duration: long": {BASE: 50.8, "VideoRFT-7B": 50.7, "Video-R1-7B": 50.6, OURS: 54.9},
    },
    "worldsense": {
        "accuracy": {BASE: 36.1, "VideoRFT-7B": 38.2, "Video-R1-7B": 35.5, OURS: 37.5, "GPT-4o": 42.6},
        "task_domain: Recognition": {BASE: 33.7, "VideoRFT-7B": 36.6, "Video-R1-7B": 32.8, OURS: 36.8},
    },
    "videommmu": {
        "accuracy": {BASE: 51.2, "VideoRFT-7B": 51.1, "Video-R1-7B": 52.4, OURS: 52.3, "GPT-4o": 61.2},
        "category: Perception": {BASE: 64.7, "VideoRFT-7B": 66.0, "Video-R1-7B": 65.3, OURS: 68.0, "GPT-4o": 66.0},
    },
    "longvideo_reason": {"accuracy": {BASE: 59.3, "VideoRFT-7B": 69.4, "Video-R1-7B": 68.9, OURS: 69.4}},
    "tvgbench": {"miou": {BASE: 16.3, "VideoRFT-7B": 14.3, "Video-R1-7B": 9.6, OURS: 20.8}},
}

# Table 6: accuracy with the cited evidence hidden, and with random regions hidden.
EVIDENCE_HIDDEN = "68.7, cited hidden 66.0, random hidden 68.0; 1.15 boxes and 1.37 times per answer"
