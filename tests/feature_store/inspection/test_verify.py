"""The verb verify: counts of what is whole, or each broken file by name and exit code 2."""

from pathlib import Path

import helpers
import pytest
from helpers import fail, run
from store_files_cases import full_store

from elastic_rec.feature_store.inspection.verify import Findings, verify_store
from elastic_rec.feature_store.table.location import open_location
from elastic_rec.feature_store.utils.checked_json import describe_file, write_checked, write_signed
from elastic_rec.feature_store.utils.errors import DataError
from elastic_rec.pipeline.reports.verified_files import verify_run, verify_scores


def damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def write_run(folder: Path) -> Path:
    """A run folder as training leaves it, as far as verify reads it."""
    for step in (3, 6):
        step_dir = folder / "run" / "checkpoints" / f"step-{step:08d}"
        step_dir.mkdir(parents=True)
        files = {}
        for name in (".metadata", "__0_0.distcp"):
            (step_dir / name).write_bytes(f"{name} {step}".encode() * 9)
            files[name] = describe_file(step_dir / name)
        write_checked(step_dir / "complete.json", {"step": step, "files": files})
    (folder / "run" / "checkpoints" / "step-00000009.tmp").mkdir()
    write_signed(folder / "run" / "config.yaml", "task: next_item\n")
    for name in ("tables.json", "baselines.json"):
        write_checked(folder / "run" / name, {"rows": 3})
    return folder / "run"


def write_scores(folder: Path) -> Path:
    out, parts = folder / "scores", []
    out.mkdir()
    for number in range(3):
        path = out / f"part-{number:05d}.parquet"
        path.write_bytes(b"scores" * (9 + number))
        parts.append({"path": path.name, "rows": number, **describe_file(path)})
    write_checked(out / "_manifest.json", {"parts": parts})
    write_checked(out / "_job.json", {"k": 5})
    return out


def test_the_verb(tmp_path):
    store = full_store(tmp_path)
    where = [f"store={store.path}", f"run={write_run(tmp_path)}", f"scores={write_scores(tmp_path)}"]
    figures = run("verify", *where)
    counts = {"data_files": 4, "impression_files": 7, "states": 2, "checkpoint_files": 4, "score_parts": 3, "broken": 0}
    assert {name: figures[name] for name in counts} == counts and figures["bytes"] > 10_000
    broken = [
        Path(store.files[0].path),
        next(Path(store.path).glob("impressions/items/*.parquet")),
        next((tmp_path / "run").glob("checkpoints/step-00000006/__0_0.distcp")),
        tmp_path / "scores" / "part-00002.parquet",
    ]
    for path in broken:
        damage(path)
    code, stderr = fail("verify", *where)
    assert code == 2 and "error: 4 files are broken (named above), " in stderr
    lines = [line for line in stderr.splitlines() if line.startswith("broken: ")]
    assert [sum(str(path) in line for line in lines) for path in broken] == [1, 1, 1, 1] and len(lines) == 4


def broken_in(verify, path: Path) -> list[str]:
    findings = Findings()
    verify(path, findings)
    return findings.broken


def test_each_kind_of_damage_to_a_store_is_named(tmp_path):
    root = Path(full_store(tmp_path).path)

    def broken() -> list[str]:
        return broken_in(verify_store, open_location(root))

    assert broken() == []
    manifests = [root / "manifest-000000.json", root / "impressions" / "manifest.json"]
    for path in [*sorted(root.rglob("*.parquet")), *manifests]:
        before = path.read_bytes()
        if path.parent.parent.name != "states":
            damage(path)
            assert [str(path) in line for line in broken()] == [True], path
        path.write_bytes(before[:-9])
        assert [str(path) in line for line in broken()] == [True], path
        path.write_bytes(before)
    with pytest.raises(DataError, match="no such folder"):
        verify_store(open_location(tmp_path / "none"), Findings())


def test_runs_and_scores(tmp_path):
    run_dir, scores = write_run(tmp_path), write_scores(tmp_path)
    assert broken_in(verify_run, run_dir) == broken_in(verify_scores, scores) == []
    about = [run_dir / name for name in ("config.yaml", "tables.json", "baselines.json")] + [scores / "_job.json"]
    for path in about:
        verify, before = (verify_run, run_dir) if path.parent == run_dir else (verify_scores, scores), path.read_bytes()
        damage(path)
        assert [f"{path} is damaged" in line for line in broken_in(*verify)] == [True]
        path.unlink()
        wanted = [] if path.name == "baselines.json" else [True]  # run.baselines=false
        assert [f"{path} is missing" in line for line in broken_in(*verify)] == wanted
        path.write_bytes(before)
    marker = run_dir / "checkpoints" / "step-00000003" / "complete.json"
    marker.write_text(marker.read_text().replace('"step": 3', '"step": 4'))
    assert "complete.json is damaged: its content does not fit its sha256" in broken_in(verify_run, run_dir)[0]
    write_checked(marker, {"step": 3, "files": {"../../x": {"bytes": 0, "sha256": ""}}})
    assert "names files elsewhere: ../../x" in broken_in(verify_run, run_dir)[0]
    write_checked(marker, {"step": 3})
    assert "has no files: written by an earlier version" in broken_in(verify_run, run_dir)[0]
    (scores / "part-00001.parquet").unlink()
    (scores / "part-00007.parquet").write_text("another job's")
    first, second = broken_in(verify_scores, scores)
    assert "part-00001.parquet is missing" in first and "part-00007.parquet is not named by" in second
    (scores / "_manifest.json").unlink()
    (line,) = broken_in(verify_scores, scores)
    assert line == f"{scores}/_manifest.json is missing: the job has not ended, run it again"
    with pytest.raises(DataError, match="not a run, it has no folder checkpoints"):
        verify_run(tmp_path, Findings())
    code, message = helpers.fail("verify")
    assert code == 2 and "nothing to verify: set store=, run= or scores=" in message
