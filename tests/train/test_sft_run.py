"""A run of stage one around its step: a clip that cannot be read, what is written, what is left behind."""

import dataclasses
import json
import threading

import jax
import pytest

from openo3_jax import policy as policy_lib
from openo3_jax import recipes, tasks, tiny
from openo3_jax.config import VideoConfig
from openo3_jax.data import annotations, store, synthetic
from openo3_jax.errors import InputError
from openo3_jax.train import gspo, sft, steps

RECORD = {
    "task": tasks.GENERAL_MCQ,
    "source": "videor1_mcq",
    "video_path": "a.mp4",
    "question": "Which?\nA. x\nB. y",
    "answer": "B",
    "reasoning_process": "So.",
}
PREPARED = {"frames": "raw", "video": store.stored_settings(VideoConfig(max_frames=8)), "stages": {}}
MISTAKES = {  # records, manifest, weights, what is said
    "no records": ([], None, (), "holds no records; expected at least one"),
    "weights": ([RECORD], None, (("visual QQ", 2.0),), "weights: 'visual QQ' is no task or source of these records"),
    "settings": ([RECORD], PREPARED, (), "was prepared with max_frames=8, not 16"),
}


@pytest.mark.parametrize("stage", ["sft", "gspo"])
@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_in_the_data_are_told_before_weights_are_loaded(name, stage, tmp_path, monkeypatch):
    records, manifest, weights, message = MISTAKES[name]
    (tmp_path / "json_data").mkdir()
    for file in annotations.STAGE_FILES.values():
        (tmp_path / "json_data" / file).write_text(json.dumps(records))
    if manifest is not None:
        (tmp_path / store.MANIFEST).write_text(json.dumps(manifest))
    monkeypatch.setattr(policy_lib, "load_pretrained", lambda *_, **__: pytest.fail("the weights have been loaded"))
    recipe, run = (recipes.sft_tiny(), sft.run_sft) if stage == "sft" else (recipes.gspo_tiny(), gspo.run_gspo)
    config = dataclasses.replace(recipe, weights=weights)
    with pytest.raises(InputError, match=message):
        run(model=tmp_path / "model", data=tmp_path, out=tmp_path / "run", config=config)
    assert not (tmp_path / "run").exists()


def test_a_run_names_what_it_cannot_read_and_measures_its_batches(tmp_path, one_device, capfd, monkeypatch):
    shown = []

    def make_step(config):
        def step(state, batch):
            shown.append(batch)
            return state, {"loss": 1.0, "grad_norm": 1.0}

        return step

    monkeypatch.setattr(steps, "make_sft_step", make_step)  # compiled and judged elsewhere
    synthetic.write_dataset(tmp_path / "data", num_train=6, seed=0)
    tiny.init_tiny(tmp_path / "model", hidden_size=64, layers=2)
    records = annotations.load_stage(tmp_path / "data", "sft")
    bad = next(index for index, record in enumerate(records) if "video_path" in record)
    for path in (tmp_path / "data").glob(f"videos/**/{records[bad]['video_path']}"):
        path.write_text("nothing")
    config = dataclasses.replace(
        recipes.sft_tiny(),
        steps=3,
        batch_size=len(records),
        workers=1,
        max_bad_fraction=0.5,
        video=VideoConfig(max_frames=4, min_pixels=4 * 28 * 28, max_pixels=4 * 28 * 28),
    )
    out = tmp_path / "run"
    sft.run_sft(model=tmp_path / "model", data=tmp_path / "data", out=out, config=config, mesh=one_device)
    found = [json.loads(line) for line in (out / "bad_samples.jsonl").read_text().splitlines()]
    shared = [i for i, record in enumerate(records) if record.get("video_path") == records[bad]["video_path"]]
    assert sorted(line["index"] for line in found) == shared
    assert "cannot be decoded" in found[0]["reason"]
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == len(shown) == 3
    for values, batch in zip(lines, shown, strict=True):
        assert isinstance(batch.vision.patches, jax.Array) and batch.vision.patches.dtype == "uint8"
        assert (values["data/rows"], values["data/row_tokens"]) == batch.tokens.shape
        assert values["data/empty_places"] == len(shared)
        assert 0 < values["data/token_waste"] < 1 and 0 < values["data/patch_waste"] < 1
        shape = f"{values['data/rows']:.0f} x {values['data/row_tokens']:.0f} ({values['data/row_patches']:.0f})"
    assert f"rows x tokens (patches) of the batches: {shape}" in capfd.readouterr().err
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("ahead")]
