"""Paths on the command line: what Hydra cannot parse comes back quoted, as its user typed it; quoted, it is read."""

import shlex
import sys

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from elastic_rec.pipeline import ingest as ingest_verb
from elastic_rec.pipeline.runtime.launch import quoting_advice


def quoted(argument: str) -> str:
    """The override that the advice shows, as the shell would pass it on."""
    (line,) = quoting_advice([argument]).splitlines()
    (override,) = shlex.split(line.split(": ", 1)[1])
    return override


NAMES = [*"=()~é[]{}#!&;^<>`'\"", "größe (1)", "a[1].csv", "dt=2024-01-01/h=07", "it's", "\\d=", '\\"=']


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("form", ["data.ingest.input=[/logs/{}/x.csv]", "run.dir=/logs/{}/x.csv"])
def test_the_quoted_form_means_the_path(name, form):
    value = OverridesParser.create().parse_override(quoted(form.format(name))).value()
    assert value in ([f"/logs/{name}/x.csv"], f"/logs/{name}/x.csv")


def test_lists_commas_and_what_needs_no_quotes():
    assert quoted('i=[/a b,"/x/y",/dt=1]') == 'i=["/a b","/x/y","/dt=1"]'
    assert quoted("run.dir=/a,b") == 'run.dir="/a,b"'
    for argument in ("i=[/a b/c.csv,s3://b/*.csv]", "i=/a", 'i="/dt=1"', "optim.lr=1,2", "nothing", "--help"):
        assert quoting_advice([argument]) == ""


def test_the_verb_says_it(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "dt=2024-01-01" / "größe (1)"
    folder.mkdir(parents=True)
    (folder / "e.csv").write_text("user_id,item_id,timestamp\n1,2,3\n")
    rest = ["data=files", f'data.store="{tmp_path}/s"']
    monkeypatch.setattr(sys, "argv", ["ingest.py", *rest, typed := f"data.ingest.input=[{folder}/e.csv]"])
    with pytest.raises(SystemExit):
        ingest_verb.main()
    text = capsys.readouterr().err
    wanted = f'data.ingest.input=["{folder}/e.csv"]'
    assert shlex.quote(wanted) in text and quoted(typed) == wanted
    monkeypatch.setattr(sys, "argv", ["ingest.py", *rest, wanted])
    ingest_verb.main()
    assert '"events": 1' in capsys.readouterr().out
