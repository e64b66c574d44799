"""Loaded models in processes of their own: what they inherit, how they queue, end, come back and are replaced."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from signal import SIGKILL, SIGSTOP

import numpy as np
import pytest
from msgspec.structs import replace
from sklearn.linear_model import LogisticRegression
from sklearn.tree import DecisionTreeClassifier

from divault.errors import (
    CidMismatch,
    DeadlineExceeded,
    InputInvalid,
    ModelFailed,
    ModelNotLoaded,
    NotReady,
    Overloaded,
    TooLarge,
    UnsupportedModel,
)
from divault.values import OpenedModel
from divault.workers.child import ENVIRONMENT
from divault.workers.pool import WorkerPool
from divault.workers.wire import MAX_ITEM_BYTES
from divault.workers.worker import Tuning
from tests.worker_models import alive, answer, call, children, dumped, hold, hostile, opened, output

MakePool = Callable[..., WorkerPool]
ROW = {"features": [5.1, 3.5]}


def fitted() -> LogisticRegression:
    random = np.random.default_rng(20)
    rows = random.normal(size=(60, 2))
    return LogisticRegression().fit(rows, rows[:, 0] > 0)


def endless() -> bytes:
    """A tree whose root is its own child: an ordinary file of data whose predict never ends."""
    tree = DecisionTreeClassifier(max_depth=1).fit([[0.0], [1.0]], [0, 1])
    state = tree.tree_.__getstate__()
    state["nodes"]["left_child"][0] = state["nodes"]["right_child"][0] = 0
    tree.tree_.__setstate__(state)
    return dumped(tree)


@pytest.fixture(scope="module")
def regression() -> bytes:
    return dumped(fitted())


@pytest.fixture
async def make_pool() -> AsyncIterator[MakePool]:
    """Pools; at the end none of their processes is left."""
    before = children()
    pools: list[WorkerPool] = []

    def make(predict_s: float = 10, tuning: Tuning | None = None) -> WorkerPool:
        pools.append(WorkerPool(predict_timeout_s=predict_s, load_timeout_s=60, tuning=tuning))
        return pools[-1]

    yield make
    for pool in pools:
        await pool.close()
    assert children() <= before


async def until(holds: Callable[[], bool], limit_s: float = 20) -> None:
    async with asyncio.timeout(limit_s):
        while not holds():
            await asyncio.sleep(0.02)


async def test_answers_equal_the_library(make_pool: MakePool, regression: bytes) -> None:
    pool, model = make_pool(), opened(regression)
    loaded = await pool.load(model)

    found = await output(pool, model, ROW)

    ours = fitted()
    result = json.loads(found.result)
    assert result["predictions"] == ours.predict([ROW["features"]]).tolist()
    assert result["probabilities"] == ours.predict_proba([ROW["features"]]).tolist()
    assert (found.rows, found.plaintext_sha256) == (1, model.plaintext_sha256)
    assert found.runtime == dict(loaded.description.runtime)
    assert loaded.description.runtime["libraries"]["scikit-learn"]
    assert (loaded.state, loaded.sandbox, loaded.bytes) == ("ready", "standard", len(regression))


async def test_a_worker_holds_its_socket_and_the_model_and_nothing_else(make_pool: MakePool, regression: bytes) -> None:
    pool, model = make_pool(), opened(regression)
    secret = os.open("/etc/hostname", os.O_RDONLY)
    os.set_inheritable(secret, True)
    os.environ["DIVAULT_TEST_SECRET"] = "s3cret"
    try:
        pid = (await pool.load(model)).pid
    finally:
        os.close(secret)
        del os.environ["DIVAULT_TEST_SECRET"]

    links = {int(entry.name): str(entry.readlink()) for entry in Path(f"/proc/{pid}/fd").iterdir()}
    environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    limits = Path(f"/proc/{pid}/limits").read_text()
    status = Path(f"/proc/{pid}/status").read_text()

    assert (links.pop(0), links.pop(1)) == ("/dev/null", "/dev/null")
    assert links.pop(2).startswith("pipe:")
    assert sorted(link.partition(":")[0] for link in links.values()) == ["/memfd", "socket"]
    assert {entry.partition(b"=")[0].decode() for entry in environment if entry} <= ENVIRONMENT
    assert "NoNewPrivs:\t1" in status
    assert limits.split("Max core file size")[1].split()[:2] == ["0", "0"]
    assert limits.split("Max file size")[1].split()[:2] == ["0", "0"]
    assert os.getpgid(pid or 0) == pid
    assert Path(f"/proc/{pid}/oom_score_adj").read_text().strip() == "1000"


async def test_the_report_tells_what_a_worker_proved(make_pool: MakePool) -> None:
    pool = make_pool()
    assert set(pool.sandbox_report()["checks"].values()) == {"unknown"}, "nothing is claimed before a worker said it"

    sentence = await pool.probe()

    report = pool.sandbox_report()
    assert "no model is loaded" in sentence
    assert report["effective"] == pool.sandbox_level == "standard"
    assert report["checks"]["mem_limit"] == report["checks"]["no_new_privs"] == "enforced"
    assert report["checks"]["fs_read"] == report["checks"]["net_tcp"] == "enforced"
    assert report["checks"]["net_ns"] == "not_enforced", "namespaces are the level strict's"


async def test_a_killed_worker_fails_the_run_in_flight_alone(make_pool: MakePool) -> None:
    pool, model = make_pool(tuning=hostile("slow")), opened(b"any")
    pid = (await pool.load(model)).pid
    runs = [asyncio.create_task(answer(pool, model, {})) for _ in range(3)]
    await asyncio.sleep(0.1)

    os.kill(pid or 0, SIGKILL)
    first, *others = await asyncio.gather(*runs, return_exceptions=True)

    assert isinstance(first, ModelFailed)
    assert first.data["kind"] == "crashed"
    assert others == [{"predictions": [1]}] * 2
    assert pool.loaded()[0].pid != pid


async def test_a_real_model_comes_back_after_a_kill(make_pool: MakePool, regression: bytes) -> None:
    pool, model = make_pool(), opened(regression)
    pid = (await pool.load(model)).pid
    before = await answer(pool, model, ROW)

    os.kill(pid or 0, SIGKILL)
    await until(lambda: pool.loaded()[0].state == "ready" and pool.loaded()[0].pid not in (None, pid))

    assert await answer(pool, model, ROW) == before


async def test_an_endless_model_is_stopped_and_comes_back(make_pool: MakePool) -> None:
    pool, model = make_pool(predict_s=1), opened(endless())
    pid = (await pool.load(model)).pid

    with pytest.raises(DeadlineExceeded):
        await answer(pool, model, {"features": [1.0]})

    assert not alive(pid or 0)
    await until(lambda: pool.loaded()[0].state == "ready")
    assert "every idle worker answered" in await pool.probe()


async def test_two_models_run_side_by_side(make_pool: MakePool, regression: bytes) -> None:
    """One that hangs doesn't keep the other waiting."""
    pool, stuck, model = make_pool(predict_s=3), opened(endless(), "stuck"), opened(regression)
    await asyncio.gather(pool.load(stuck), pool.load(model))
    hanging = asyncio.create_task(answer(pool, stuck, {"features": [1.0]}))
    await asyncio.sleep(0.1)

    found = await answer(pool, model, ROW)

    assert found["predictions"]
    assert not hanging.done()
    with pytest.raises(DeadlineExceeded):
        await hanging


async def test_a_full_queue_says_when_to_come_back(make_pool: MakePool) -> None:
    pool, model = make_pool(tuning=hostile("slow", max_queue=2)), opened(b"any")
    await pool.load(model)
    running = asyncio.create_task(answer(pool, model, {}))
    await asyncio.sleep(0.05)
    waiting = [asyncio.create_task(answer(pool, model, {})) for _ in range(2)]
    await asyncio.sleep(0)

    with pytest.raises(Overloaded) as caught:
        await answer(pool, model, {})

    assert caught.value.data["retry_after"] >= 1
    assert await asyncio.gather(running, *waiting) == [{"predictions": [1]}] * 3


async def test_a_caller_who_went_away_is_not_run(make_pool: MakePool) -> None:
    pool, model = make_pool(tuning=hostile("count")), opened(b"any")
    await pool.load(model)
    first = asyncio.create_task(answer(pool, model, {}))
    await asyncio.sleep(0.05)
    gone = [asyncio.create_task(answer(pool, model, {})) for _ in range(5)]
    await asyncio.sleep(0)
    for task in gone:
        task.cancel()

    last = await answer(pool, model, {})

    assert await first == 1
    assert last == 2, "the five in between never reached the model"


async def test_who_goes_away_while_running_disturbs_nobody(make_pool: MakePool) -> None:
    pool, model = make_pool(tuning=hostile("count")), opened(b"any")
    pid = (await pool.load(model)).pid
    first = asyncio.create_task(answer(pool, model, {}))
    await asyncio.sleep(0.05)
    first.cancel()

    assert await answer(pool, model, {}) == 2
    assert pool.loaded()[0].pid == pid


async def test_who_waits_too_long_is_told_so_and_not_run(make_pool: MakePool) -> None:
    pool, model = make_pool(predict_s=0.5, tuning=hostile("slow")), opened(b"any")
    await pool.load(model)

    runs = [asyncio.create_task(answer(pool, model, {})) for _ in range(4)]
    found = await asyncio.gather(*runs, return_exceptions=True)

    assert found[0] == found[1] == {"predictions": [1]}
    assert isinstance(found[3], DeadlineExceeded)
    assert "was not run" in found[3].detail


async def test_unload_ends_the_process_and_gives_memory_back(make_pool: MakePool, regression: bytes) -> None:
    pool = make_pool()
    before = memory_files()
    model = opened(regression + bytes(50_000_000))
    pid = (await pool.load(model)).pid
    assert memory_files() == before + 1

    assert await pool.unload(model.model.key) is True

    assert not alive(pid or 0)
    assert memory_files() == before
    assert pool.loaded() == []
    assert await pool.unload(model.model.key) is False
    with pytest.raises(ModelNotLoaded):
        await output(pool, model, ROW)
    with pytest.raises(ModelNotLoaded):
        pool.describe(model)


async def test_unloading_tells_those_who_wait(make_pool: MakePool) -> None:
    pool, model = make_pool(tuning=hostile("slow")), opened(b"any")
    await pool.load(model)
    runs = [asyncio.create_task(answer(pool, model, {})) for _ in range(3)]
    await asyncio.sleep(0.05)

    await pool.unload(model.model.key)
    found = await asyncio.gather(*runs, return_exceptions=True)

    assert [type(error) for error in found] == [NotReady] * 3


async def test_another_cid_replaces_the_model(make_pool: MakePool, regression: bytes) -> None:
    pool, old, new = make_pool(), opened(regression), opened(regression, cid="bafktwo")
    pid = (await pool.load(old)).pid
    assert pool.find(old.model, old.cid) is old
    assert pool.find(new.model, new.cid) is None, "loaded under another CID is not loaded"

    await pool.load(new)

    assert not alive(pid or 0)
    assert pool.find(old.model, old.cid) is None
    assert pool.find(new.model, new.cid) is new
    assert len(pool.loaded()) == 1


async def test_a_replacement_that_fails_leaves_the_model_as_it_is(make_pool: MakePool, regression: bytes) -> None:
    pool, old = make_pool(), opened(regression)
    await pool.load(old)

    with pytest.raises(UnsupportedModel):
        await pool.load(opened(b"no model", cid="bafktwo"))

    assert pool.find(old.model, old.cid) is old
    assert (await answer(pool, old, ROW))["predictions"]


async def test_a_run_needs_a_grant_of_the_same_content(make_pool: MakePool, regression: bytes) -> None:
    pool, model = make_pool(), opened(regression)
    await pool.load(model)
    granted = hold(opened_elsewhere(model))

    with pytest.raises(CidMismatch) as caught:
        await pool.run(model, granted, call(model, ROW))

    assert caught.value.data == {"have": "bafkone", "need": "bafkother"}


def opened_elsewhere(model: OpenedModel) -> OpenedModel:
    return replace(model, cid=replace(model.cid, text="bafkother"))


async def test_a_call_without_input_is_refused_with_an_example(make_pool: MakePool, regression: bytes) -> None:
    pool, model = make_pool(), opened(regression)
    await pool.load(model)

    with pytest.raises(InputInvalid) as caught:
        await pool.run(model, hold(model), call(model, None))

    assert (await answer(pool, model, caught.value.data["example"]))["predictions"]


async def test_more_than_a_worker_takes_is_its_callers_fault_and_costs_no_worker(
    make_pool: MakePool, regression: bytes
) -> None:
    pool, model = make_pool(), opened(regression)
    await pool.load(model)
    pid = pool._entries[model.model.key].worker.pid
    most = b'{"features": [5.1, 3.5]}'.ljust(MAX_ITEM_BYTES)

    with pytest.raises(TooLarge) as caught:
        await output(pool, model, most + b" ")

    assert caught.value.data == {"limit_bytes": MAX_ITEM_BYTES, "have_bytes": MAX_ITEM_BYTES + 1}
    assert (await output(pool, model, most)).rows == 1
    assert pool._entries[model.model.key].worker.pid == pid


async def test_input_that_is_no_strict_json_never_reaches_the_model(make_pool: MakePool, regression: bytes) -> None:
    """What is strict is in test_worker_strict_json."""
    pool, model = make_pool(), opened(regression)
    await pool.load(model)

    for raw in (b"", b'{"features": [NaN, 1]}', b'{"features": [1, 2], "features": [1, 2]}'):
        with pytest.raises(InputInvalid) as caught:
            await output(pool, model, raw)

        assert caught.value.data["field"] == "input_data"


async def test_a_stopped_worker_is_noticed_by_the_probe(make_pool: MakePool) -> None:
    pool, model = make_pool(tuning=hostile("honest", ping_s=0.3)), opened(b"any")
    pid = (await pool.load(model)).pid
    os.kill(pid or 0, SIGSTOP)

    with pytest.raises(ModelFailed, match="the worker of m does not answer"):
        await pool.probe()

    await until(lambda: pool.loaded()[0].state == "ready")
    assert "every idle worker answered" in await pool.probe()


async def test_a_model_unloaded_during_the_probe_does_not_fail_it(make_pool: MakePool) -> None:
    pool, model, other = make_pool(tuning=hostile("honest")), opened(b"any"), opened(b"any", name="other")
    loaded = await pool.load(model)
    await pool.load(other)
    os.kill(loaded.pid or 0, SIGSTOP)
    probing = asyncio.create_task(pool.probe())
    worker = pool._entries[model.model.key].worker
    await until(lambda: bool(worker._flight))
    await pool.unload(model.model.key)

    assert "every idle worker answered" in await probing


async def test_a_model_that_is_given_up_for_a_while_fails_the_probe(make_pool: MakePool) -> None:
    pool, model = make_pool(tuning=hostile("exit", deaths=1)), opened(b"any")
    await pool.load(model)
    with pytest.raises(ModelFailed):
        await answer(pool, model, {})
    await until(lambda: pool.loaded()[0].state == "failed")

    with pytest.raises(NotReady, match="died 1 times"):
        await pool.probe()


async def test_a_closing_pool_takes_no_model(make_pool: MakePool) -> None:
    pool, processes = make_pool(tuning=hostile("load_hang")), children()
    loading = asyncio.create_task(pool.load(opened(b"any")))
    await until(lambda: children() > processes)
    await pool.close()
    os.kill((children() - processes).pop(), SIGKILL)

    with pytest.raises((NotReady, ModelFailed)):
        await loading
    with pytest.raises(NotReady):
        await pool.load(opened(b"any"))


@pytest.mark.parametrize("module", ["divault.workers.pool", "divault.service", "divault.models"])
def test_the_gateway_imports_no_model_library(module: str) -> None:
    script = f"import sys, {module}; print(' '.join(sorted(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split()

    assert not {"torch", "sklearn", "numpy", "scipy", "joblib", "transformers", "safetensors"} & set(found)
    assert "divault.models.pickles" not in found


def test_the_worker_knows_no_keys_chain_or_network() -> None:
    formats = "divault.models.sklearn, divault.models.torch_state, divault.models.huggingface"
    script = f"import sys, divault.workers.child, {formats}; print(' '.join(sorted(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split()

    barred = ("chain", "storage", "auth", "payments", "receipts", "state", "settings", "client", "service", "telemetry")
    assert not {f"divault.{name}" for name in barred} & set(found)
    assert not {"aiohttp", "coincurve", "cryptography", "fastapi", "structlog", "uvicorn"} & set(found)


def memory_files() -> int:
    links = []
    for entry in Path("/proc/self/fd").iterdir():
        try:
            links.append(str(entry.readlink()))
        except OSError:
            continue
    return sum("memfd:" in link for link in links)
