"""Rendered clips -> V-STaR in its own layout, with exact times and boxes: what the whole chain is tested on."""

import json
from pathlib import Path

import numpy as np

from openo3_jax.data import synthetic
from openo3_jax.evals import store

FPS = 10


def write_vstar(
    root: Path, *, num_items: int, seed: int, num_frames: int = 40, height: int = 112, width: int = 140
) -> None:
    """Write `V_STaR_test.json` and `videos/` for `num_items` clips of one moving shape at 10 frames a second.

    A box stands at every whole second inside the span, as in V-STaR. Equal arguments, equal files.
    Raises: InputError as `synthetic.render_clip` does.
    """
    (root / "videos").mkdir(parents=True, exist_ok=True)
    rows = []
    for i in range(num_items):
        clip_seed = int(np.random.default_rng([seed, i]).integers(2**32))
        track = synthetic.render_clip(
            root / "videos" / f"{i}.mp4", seed=clip_seed, num_frames=num_frames, fps=FPS, height=height, width=width
        )
        rows.append(_row(i, track, num_frames, height, width))
    store.replace_text(root / "V_STaR_test.json", json.dumps(rows, indent=1) + "\n")


def _row(number: int, track: synthetic.Track, num_frames: int, height: int, width: int) -> dict[str, object]:
    start_s, end_s = track.visible_s
    shown = np.flatnonzero(~np.isnan(track.boxes_frac[:, 0]))
    boxes = []
    for i in shown[track.times_s[shown] % 1 == 0]:
        corners_px = track.boxes_frac[i] * [width, height, width, height]
        box = dict(zip(("xmin", "ymin", "xmax", "ymax"), corners_px.round(3).tolist(), strict=True))
        boxes.append({"timestamp": int(track.times_s[i]), **box})
    return {
        "vid": str(number),
        "domain": track.ground,
        "fps": FPS,
        "frame_count": num_frames,
        "width": width,
        "height": height,
        "question": f"What moves over the {track.ground} background?",
        "answer": f"a {track.name}",
        "temporal_question": f"When is the {track.name} visible?",
        "spatial_question": f"Where is the {track.name}?",
        "spatial_question_2": f"Where is the {track.name}?",
        "timestamps": [start_s, end_s],
        "bboxes": boxes,
    }
