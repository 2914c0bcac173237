"""The one training loop: checkpoints, resume, keys, losses that are not finite, the schedule, shares of a batch."""

from __future__ import annotations

import math
import types

import pytest
import torch

from sdood_plugin.config import RunConfig
from sdood_plugin.errors import RunError, UsageError
from sdood_plugin.training import Descent, Job, initialised, make_accelerator, share, train_steps, warmup_cosine

from .resuming import Killed


class Counter:
    """Something with a state: the steps it has seen."""

    def __init__(self):
        self.seen = []

    def state_dict(self):
        return {"seen": torch.tensor(self.seen)}

    def load_state_dict(self, state):
        self.seen = state["seen"].tolist()


def run(
    folder, accelerator, counter, *, steps=6, key="k", seconds=0.0, losses=lambda index: {"loss": torch.tensor(float(index))}
):
    def step(index):
        counter.seen.append(index)
        return losses(index)

    return train_steps(
        step,
        steps,
        {"counter": counter},
        Job(accelerator, folder, key=key, checkpoint_seconds=seconds),
        name="trial",
        checkpoint="c.pt",
    )


def test_every_step_is_done_once_and_recorded(tmp_path, accelerator):
    counter = Counter()
    history = run(tmp_path, accelerator, counter, losses=lambda i: {"loss": torch.tensor(float(i)), "part": torch.tensor(i / 2)})
    assert counter.seen == list(range(6))
    assert history == {"loss": [0, 1, 2, 3, 4, 5], "part": [0, 0.5, 1, 1.5, 2, 2.5]}


@pytest.mark.parametrize("key", ["k", "other"])
def test_resumes_from_a_checkpoint_of_its_own_key_only(tmp_path, accelerator, key):
    def dying(index):
        if index == 4:
            raise Killed
        return {"loss": torch.tensor(float(index))}

    with pytest.raises(Killed):
        run(tmp_path, accelerator, Counter(), losses=dying)
    done = []
    counter = Counter()
    history = run(tmp_path, accelerator, counter, key=key, losses=lambda i: (done.append(i), {"loss": torch.tensor(float(i))})[1])
    assert done == ([4, 5] if key == "k" else list(range(6)))
    assert counter.seen == list(range(6)) and history == {"loss": [0, 1, 2, 3, 4, 5]}


@pytest.mark.parametrize("keep", [0, 4, 300])
def test_a_truncated_checkpoint_is_named(tmp_path, accelerator, keep):
    path = tmp_path / "c.pt"
    torch.save({"key": "k", "tensor": torch.zeros(1000)}, path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(RunError, match=r"c\.pt: got .*; expected a whole checkpoint; delete it"):
        run(tmp_path, accelerator, Counter())


def test_no_checkpoint_before_its_time(tmp_path, accelerator):
    run(tmp_path, accelerator, Counter(), seconds=1e9)
    assert not (tmp_path / "c.pt").exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["loss", "outside"])
def test_a_loss_that_is_not_finite_stops_with_the_step(tmp_path, accelerator, name, value):
    def losses(index):
        return {"loss": torch.tensor(1.0), "outside": torch.tensor(1.0), **({name: torch.tensor(value)} if index == 3 else {})}

    with pytest.raises(RunError, match=f"trial {name} at step 3: got {value}"):
        run(tmp_path, accelerator, Counter(), losses=losses)
    saved = torch.load(tmp_path / "c.pt", weights_only=True)
    assert saved["step"] == 3 and saved["state"]["counter"]["seen"].tolist() == [0, 1, 2]  # the last good one is kept


def test_a_network_that_diverges_names_its_step(tmp_path, accelerator, tiny, pictures):
    import dataclasses

    from sdood_plugin.diffusion.training import train_diffusion

    wild = dataclasses.replace(tiny, lr=1e30, steps=20)
    with pytest.raises(RunError, match=r"diffusion loss at step \d+: got (nan|inf)"):
        train_diffusion(
            pictures.images,
            pictures.labels,
            wild,
            Job(accelerator, tmp_path),
            classes=3,
        )


def test_a_checkpoint_that_does_not_fit_on_the_disk(tmp_path, accelerator):
    from .test_artifacts import small_disk

    class Large(Counter):
        def state_dict(self):
            return {"seen": torch.zeros(100_000)}

    with small_disk(), pytest.raises(RunError, match="writing .*c.pt"):
        run(tmp_path, accelerator, Large())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("fraction", [0.05, 0.0, 0.3])
@pytest.mark.parametrize("steps", [1, 7, 100])
def test_learning_rate_warms_up_then_falls_like_a_cosine(steps, fraction):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=2.0)
    schedule = warmup_cosine(optimizer, steps, fraction)
    warm = max(1, int(steps * fraction))
    for step in range(steps):
        expected = (step + 1) / warm if step < warm else 0.5 * (1 + math.cos(math.pi * (step - warm) / (steps - warm)))
        assert optimizer.param_groups[0]["lr"] == pytest.approx(2 * expected)
        optimizer.step()
        schedule.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0 if steps > 1 else 2)


@pytest.mark.parametrize("processes", [1, 2, 3, 4])
def test_the_shares_of_all_processes_are_the_batch(processes):
    batch = torch.randperm(10, generator=torch.Generator().manual_seed(0))
    shares = [share(batch, types.SimpleNamespace(process_index=i, num_processes=processes)) for i in range(processes)]
    assert sorted(torch.cat(shares).tolist()) == list(range(10))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_accelerators():
    assert make_accelerator(RunConfig(device="cpu")).device.type == "cpu"
    assert make_accelerator(RunConfig(device="cpu")).mixed_precision == "no"
    if not torch.cuda.is_available():
        with pytest.raises(UsageError, match="device: got cuda"):
            make_accelerator(RunConfig(device="cuda"))


def test_random_weights_come_from_the_seed_and_leave_the_global_generators(monkeypatch):
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda _seed: pytest.fail("the GPUs' generators"))
    before = torch.get_rng_state()
    first, again, other = (initialised(lambda: torch.nn.Linear(3, 2), seed).weight for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("clip", [None, 0.5])
def test_a_descent_is_backward_clip_step_and_schedule(accelerator, clip):
    module = torch.nn.Linear(2, 1, bias=False)
    torch.nn.init.ones_(module.weight)
    descent = Descent(module, torch.optim.SGD(module.parameters(), lr=1.0), 4, accelerator, gradient_clip=clip)
    weight = torch.ones(2)
    for rate in (1.0, 1.0):  # the warm-up's one step, and the cosine's first
        descent(3 * descent.wrapped(torch.tensor([[0.6, 0.8]])).sum())
        gradient = 3 * torch.tensor([0.6, 0.8])
        weight = weight - rate * (gradient if clip is None else gradient * clip / 3)
    torch.testing.assert_close(module.weight[0].detach(), weight, atol=1e-5, rtol=1e-4)
    assert set(descent.state) == {"module", "optimizer", "schedule"}
