"""The example of a language model: it goes on where it stopped, its heads agree, and every loss trains."""

import json
import sys
from pathlib import Path

import pytest
import torch

import imbalance_kernels as ik

EXAMPLES = Path(__file__).parent.parent / "examples"
SMALL = ["--batch", "1", "--context", "16", "--width", "8", "--layers", "1", "--device", "cpu"]


@pytest.fixture(scope="module")
def language_model():
    sys.path.insert(0, str(EXAMPLES))
    try:
        import corpus
        import language_model
    finally:
        sys.path.remove(str(EXAMPLES))
    read = corpus.read_tokens()
    kept = (read[0][:4000] % 1009, 1009, read[2])  # real tokens, of fewer kinds
    language_model.read_tokens = lambda: kept
    return language_model


def test_goes_on_where_it_stopped(language_model, tmp_path):
    """To the bit, weights, moments and the order of the data included; the checkpoint is whole or not there."""
    whole = language_model.main([*SMALL, "--steps", "5"])
    checkpoint = ["--checkpoint", str(tmp_path / "run.pt"), "--checkpoint-every", "2"]
    language_model.main([*SMALL, *checkpoint, "--steps", "2"])
    output = tmp_path / "result.json"
    resumed = language_model.main([*SMALL, *checkpoint, "--steps", "5", "--output", str(output)])
    assert len(set(whole["losses"])) == 5
    assert resumed["losses"] == whole["losses"] == json.loads(output.read_text())["losses"]
    assert [path.name for path in tmp_path.glob("run*")] == ["run.pt"]


def test_a_checkpoint_of_another_run_is_refused(language_model, tmp_path):
    checkpoint = ["--checkpoint", str(tmp_path / "run.pt")]
    language_model.main([*SMALL, *checkpoint, "--steps", "1"])
    with pytest.raises(SystemExit, match=r"another run, with \{'loss': 'logit_adjusted'\}"):
        language_model.main([*SMALL, *checkpoint, "--steps", "2", "--loss", "focal"])


@pytest.mark.parametrize("loss", ["logit_adjusted", "cosface"])
def test_fused_and_plain_heads_agree(language_model, loss, monkeypatch):
    made = []  # logits: of steps True, of evaluation False
    logits = ik.LinearLoss.logits
    monkeypatch.setattr(
        ik.LinearLoss, "logits", lambda self, x: made.append(torch.is_grad_enabled()) or logits(self, x)
    )
    fused = language_model.main([*SMALL, "--steps", "4", "--loss", loss, "--head", "fused"])
    assert made.count(True) == 0
    plain = language_model.main([*SMALL, "--steps", "4", "--loss", loss, "--head", "plain"])
    assert made.count(True) == 4
    torch.testing.assert_close(torch.tensor(fused["losses"]), torch.tensor(plain["losses"]), rtol=1e-4, atol=1e-5)


def test_every_loss_trains(language_model):
    for loss in language_model.LOSSES:
        result = language_model.main([*SMALL, "--steps", "2", "--loss", loss])
        assert torch.tensor(result["losses"]).isfinite().all(), loss


def test_autocast(language_model):
    result = language_model.main([*SMALL, "--steps", "3", "--autocast", "bfloat16"])
    exact = language_model.main([*SMALL, "--steps", "3"])
    assert result["losses"] != exact["losses"]
    torch.testing.assert_close(torch.tensor(result["losses"]), torch.tensor(exact["losses"]), rtol=2e-2, atol=2e-2)


def test_plain_head_without_what_the_loss_needs(language_model, capsys):
    with pytest.raises(SystemExit):
        language_model.main([*SMALL, "--loss", "radius_margin", "--head", "plain"])
    assert "use --head fused" in capsys.readouterr().err
