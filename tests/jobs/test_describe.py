"""jobs.describe: the paper's table from the command line."""

import json

import pytest

from jobs.describe import COMMAND


def described(tmp_path, *args) -> dict:
    assert COMMAND.main(COMMAND.parse([*args, "--json", str(tmp_path / "described.json")], "describe")) == 0
    return json.loads((tmp_path / "described.json").read_text())


def test_the_papers_table_is_printed(tmp_path, capsys):
    found = described(tmp_path, "gru-rcn")
    said = capsys.readouterr().out
    for figure in (
        "331,776",
        "1,327,104",
        "5,308,416",
        "7,077,888",
        "19,353,600",
        "1.040e+10",
        "77,070,336",
        "56 x 56",
    ):
        assert figure in said
    assert found["parameters"]["grus"] == 19_353_600
    assert found["parameters"]["trunk"] == 134_260_544  # VGG-16 without its last layer
    assert found["parameters"]["heads"] == 101 * (64 + 128 + 256 + 256 + 512 + 5)
    assert [level["tap"] for level in found["levels"]] == ["pool2", "pool3", "pool4", "pool5", "fc7"]


def test_options_change_what_is_described(tmp_path):
    found = described(tmp_path, "gru-rcn-flow", "--model.bidirectional", "--clips.size", "112", "--classes", "7")
    assert found["parameters"]["grus"] == 2 * 19_353_600
    assert found["levels"][0]["size"] == 28
    assert found["parameters"]["trunk"] == 134_260_544 + 9 * 17 * 64  # twenty channels in for three
    assert found["parameters"]["heads"] == 7 * (2 * (64 + 128 + 256 + 256 + 512) + 5)


@pytest.mark.parametrize(("recipe", "total"), [("c3d", 78_409_573), ("vgg16-frames", 134_260_544 + 101 * 4097)])
def test_models_without_grus_have_their_parameters_counted(recipe, total, tmp_path, capsys):
    found = described(tmp_path, recipe)
    assert found["levels"] == []
    assert sum(found["parameters"].values()) == total
    assert f"{total:,} parameters" in capsys.readouterr().out
