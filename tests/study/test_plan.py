import pytest
import yaml

from padprobe.study.plan import read_study
from tests.study.conftest import edit, write


def cells(path, **options):
    return {planned.name: planned for planned in read_study(path, **options).cells}


def keys(path, name="sod-valid", **options):
    planned = cells(path, **options)[name]
    return {key: getattr(planned, f"{key}_key") for key in ("training", "scores", "probe")}


def changed(study, change, name="sod-valid"):
    """The keys that a change of the study's YAML changes."""
    before = keys(study, name)
    after = keys(edit(study, change), name)
    return {key for key in before if before[key] != after[key]}


def of(name):
    return lambda s: s["encoders"][name]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda s: None, set()),
        (lambda s: s.update(num_workers=2, cache_gb=1.0), set()),
        (lambda s: of("sod-valid")(s).update(readouts=[{"kernel_size": 1}]), set()),
        (lambda s: of("untrained-valid")(s).update(padding="zeros"), set()),
        (lambda s: s.update(anchors={"some": "thing"}), set()),
        (lambda s: s.update(readouts=[{"kernel_size": 7}]), set()),
        (lambda s: s.update(limit_test=4), {"probe"}),
        (lambda s: s["test"].update(white="white"), {"probe"}),
        (lambda s: of("sod-valid")(s)["scores"].update(more={}), {"scores"}),
        (lambda s: of("sod-valid")(s).update(seeds=[1]), {"training", "scores", "probe"}),
        (lambda s: of("sod-valid")(s)["overrides"].update({"trainer.max_epochs": 1}), {"training", "scores", "probe"}),
    ],
)
def test_keys_change_with_what_determines_the_results_and_with_nothing_else(study, change, expected):
    assert changed(study, change) == expected


def test_keys_change_with_the_files_that_a_cell_reads_wherever_they_lie(study, tmp_path):
    def use_files(s):
        s["data"] = {"pictures": {"path": str(tmp_path / "a")}, "numbers": {"path": str(tmp_path / "weights.pth")}}
        s["train"] = "${pictures}/images"
        s["encoders"]["untrained-valid"]["weights"] = "${numbers}"

    for folder in ("a", "b"):
        (tmp_path / folder / "images").mkdir(parents=True)
        (tmp_path / folder / "images" / "1.png").write_bytes(b"12")
    (tmp_path / "weights.pth").write_bytes(b"1")
    edit(study, use_files)
    before = keys(study, "untrained-valid")
    assert cells(study)["untrained-valid"].cell.train == f"{tmp_path}/a/images"
    assert keys(study, "untrained-valid", changes=[f"data.pictures.path={tmp_path}/b"]) == before
    (tmp_path / "b" / "images" / "2.png").write_bytes(b"1")
    (tmp_path / "other.pth").write_bytes(b"2")
    for change in (f"data.pictures.path={tmp_path}/b/", f"data.numbers.path={tmp_path}/other.pth"):
        assert keys(study, "untrained-valid", changes=[change])["probe"] != before["probe"]


def test_the_config_of_a_training_is_part_of_its_key(study, tmp_path):
    before = keys(study)
    path = tmp_path / "fit.yaml"
    write(path, {**yaml.safe_load(path.read_text()), "seed_everything": 3})
    assert keys(study) != before


def test_what_is_missing_is_listed_once_with_the_rows_that_wait_for_it_and_the_rest_runs(study, tmp_path, monkeypatch):
    monkeypatch.setenv("PADPROBE_DATA", str(tmp_path / "nowhere"))

    def need(s):
        s["data"] = {
            "ABC": {"path": "$PADPROBE_DATA/ABC", "what": "ABC, 5 images", "published": "http://a.b"},
            "W": {"path": "$PADPROBE_DATA/w.pth"},
        }
        s["test"]["abc"] = "${ABC}/images"
        s["encoders"]["sod-valid"]["scores"]["on ABC"] = {"data.init_args.test": "${ABC}"}
        s["encoders"]["trained"] = {"encoder": "torchvision:vgg16", "weights": "${W}"}
        fit = yaml.safe_load((tmp_path / "fit.yaml").read_text())
        fit["data"]["init_args"]["root"] = "$PADPROBE_DATA/ABC"
        write(tmp_path / "fit2.yaml", fit)
        s["encoders"]["fitted"] = {"fit": str(tmp_path / "fit2.yaml")}
        s["encoders"]["replaced"] = {
            "fit": str(tmp_path / "fit2.yaml"),
            "overrides": {"data.init_args.root": str(tmp_path)},
        }

    found = read_study(edit(study, need))
    assert [planned.name for planned in found.cells] == ["untrained-valid", "sod-valid", "replaced"]
    assert all(set(planned.cell.test) == {"scenes", "black"} for planned in found.cells)
    assert set(found.cells[1].cell.scores) == {"scenes"}
    abc = found.missing["ABC"]
    assert abc.startswith("ABC, 5 images ($PADPROBE_DATA/ABC; http://a.b): ")
    rows = ["untrained-valid on abc", "sod-valid on abc", "sod-valid on on ABC", "trained on abc", "fitted on abc"]
    assert abc.split("): ")[1].split(", ") == [*rows, "fitted", "replaced on abc"]
    assert found.missing["W"] == "W ($PADPROBE_DATA/w.pth): trained"


def test_studies_include_others_and_share_their_encoders(study, tmp_path):
    common = {"image_size": 32, "presets": {"small": {"limit_train": 4}}}
    write(tmp_path / "common.yaml", common)
    vgg = {"encoder": "torchvision:vgg11", "padding": "reflect"}
    one = {"include": ["common.yaml"], "encoders": {"vgg": vgg, "other": {"encoder": "torchvision:vgg13"}}}
    two = {
        "include": ["common.yaml"],
        "encoders": {"vgg": {**vgg, "readouts": [{}, {"kernel_size": 7}]}},
        "presets": {"small": {"encoders.vgg.limit_test": 5}},
    }
    write(tmp_path / "one.yaml", one)
    write(tmp_path / "two.yaml", two)
    both = write(tmp_path / "both.yaml", {"include": ["one.yaml", "two.yaml"], "image_size": 64})
    found = cells(both, preset="small")
    assert list(found) == ["vgg", "other"]
    assert [readout.kernel_size for readout in found["vgg"].cell.readouts] == [3, 7]
    assert {planned.cell.image_size for planned in found.values()} == {64}
    assert [(planned.cell.limit_train, planned.cell.limit_test) for planned in found.values()] == [(4, 5), (4, None)]
    # readouts and the number of encoders beside it are no part of a cell's key
    alone = cells(tmp_path / "two.yaml", preset="small", changes=["image_size=64"])
    assert alone["vgg"].probe_key == found["vgg"].probe_key

    edit(tmp_path / "two.yaml", lambda s: s["encoders"]["vgg"].update(padding="valid"))
    with pytest.raises(ValueError, match="'vgg' is included with padding 'reflect' and with 'valid'"):
        read_study(both)


def test_seeds_are_cells_of_their_own_where_weights_depend_on_them(study):
    def more_seeds(s):
        s["seeds"] = [0, 3]
        s["encoders"]["loaded"] = {"encoder": "torchvision:vgg16", "weights": "IMAGENET1K_V1"}

    found = cells(edit(study, more_seeds))
    names = ["untrained-valid-seed0", "untrained-valid-seed3", "sod-valid-seed0", "sod-valid-seed3", "loaded"]
    assert {name: planned.cell.seeds for name, planned in found.items()} == dict(
        zip(names, [[0], [3], [0], [3], [0, 3]], strict=True)
    )
    assert found["sod-valid-seed0"].training_key != found["sod-valid-seed3"].training_key


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"changes": ["image_size"]}, "expected key=value"),
        ({"changes": ["imagesize=3"]}, "'imagesize'; did you mean 'image_size'"),
        ({"changes": ["encoders.sod-vald.seeds=[1]"]}, "'sod-vald'; did you mean 'sod-valid'"),
        ({"changes": ["encoders.sod-valid.sedes=[1]"]}, "'sedes'; did you mean 'seeds'"),
        ({"changes": ["image_size=large"]}, "large"),
        ({"preset": "laptp"}, "unknown preset 'laptp'; did you mean 'laptop'"),
        ({"only": ["sod-valdi"]}, "unknown cell 'sod-valdi'; did you mean 'sod-valid'"),
    ],
)
def test_bad_options_are_named(study, options, message):
    edit(study, lambda s: s.update(presets={"laptop": {}}))
    with pytest.raises(ValueError, match=message):
        read_study(study, **options)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.update(train="${nothing}"), "unknown data 'nothing'"),
        (lambda s: s.update(include=["nowhere.yaml"]), r"no study '.*nowhere\.yaml'"),
        (lambda s: s.update(data={"a": {"pth": "x"}}), "'pth'; did you mean 'path'"),
        (lambda s: s.update(encoders={}), "no encoders"),
        (lambda s: of("sod-valid")(s).update(readouts=[{"kernel": 3}]), "'kernel'; did you mean 'kernel_size'"),
        (lambda s: of("sod-valid")(s).update(readouts=[{"kernel_size": 4}]), "expected an odd number"),
    ],
)
def test_bad_studies_are_named(study, change, message):
    with pytest.raises(ValueError, match=message):
        read_study(edit(study, change))


def test_overrides_can_be_changed_by_their_own_dotted_key(study):
    found = cells(study, changes=["encoders.sod-valid.overrides.trainer.max_epochs=7"])
    assert found["sod-valid"].cell.overrides["trainer.max_epochs"] == 7


def test_the_papers_studies_are_valid_at_every_scale(data):
    for preset in (None, "laptop", "paper"):
        found = read_study("configs/study/paper/paper.yaml", preset)
        assert set(found.missing) <= {"ECSSD", "DUT-OMRON", "VOC"}
    keyed = {planned.name: planned.probe_key for planned in found.cells}
    for i in range(1, 7):  # a cell of two tables is one cell
        part = read_study(f"configs/study/paper/table{i}.yaml", "paper")
        assert {planned.name: planned.probe_key for planned in part.cells}.items() <= keyed.items()
    vgg16 = next(planned.cell for planned in found.cells if planned.name == "vgg16")
    assert len(vgg16.readouts) == 6


def test_options_for_all_hold_for_every_encoder_that_has_no_own(study):
    edit(study, lambda s: s["encoders"]["sod-valid"].update(readouts=[{"kernel_size": 5}]))
    found = cells(study, changes=["readouts=[{kernel_size: 7}]"])
    kernels = {name: [readout.kernel_size for readout in planned.cell.readouts] for name, planned in found.items()}
    assert kernels == {"untrained-valid": [7], "sod-valid": [5]}


def test_a_change_of_one_encoder_changes_no_other(tmp_path):
    text = """
    anchors: {valid: &valid {model.init_args.encoder_padding: valid}, fit: &fit {fit: fit.yaml, overrides: *valid}}
    encoders: {a: *fit, b: {fit: fit.yaml, overrides: *valid}, c: *fit}
    """
    (tmp_path / "study.yaml").write_text(text)
    found = cells(tmp_path / "study.yaml", changes=["encoders.a.overrides.trainer.max_epochs=1", "encoders.c.task=SS"])
    assert [planned.cell.overrides for planned in found.values()] == [
        {"model.init_args.encoder_padding": "valid", "trainer.max_epochs": 1},
        *[{"model.init_args.encoder_padding": "valid"}] * 2,
    ]
    assert [planned.cell.task for planned in found.values()] == ["", "", "SS"]


def test_a_path_of_the_studys_data_holds_for_its_trainings_too(study, tmp_path, monkeypatch):
    monkeypatch.delenv("PADPROBE_DATA", raising=False)
    (tmp_path / "elsewhere" / "train").mkdir(parents=True)
    fit = yaml.safe_load((tmp_path / "fit.yaml").read_text())
    fit["data"]["init_args"]["root"] = "$PADPROBE_DATA/ABC/train"
    write(tmp_path / "fit.yaml", fit)
    edit(study, lambda s: s.update(data={"ABC": {"path": "$PADPROBE_DATA/ABC"}}))
    assert "sod-valid" not in cells(study)
    found = cells(study, changes=[f"data.ABC.path={tmp_path}/elsewhere"])
    assert found["sod-valid"].cell.overrides["data.init_args.root"] == f"{tmp_path}/elsewhere/train"


def test_a_training_is_the_same_however_many_seeds_stand_beside_its_own(study):
    alone = cells(study)["sod-valid"]
    beside = cells(study, changes=["seeds=[0, 1]"])["sod-valid-seed0"]
    assert (alone.folder, alone.training_key, alone.probe_key) == (
        beside.folder,
        beside.training_key,
        beside.probe_key,
    )


def test_weights_say_what_is_untrained(study):
    def more(s):
        s["encoders"]["loaded"] = {"encoder": "torchvision:vgg16", "weights": "IMAGENET1K_V1"}

    found = cells(edit(study, more))
    tasks = {name: planned.cell.task for name, planned in found.items()}
    assert tasks == {"untrained-valid": "untrained", "sod-valid": "SOD", "loaded": ""}
