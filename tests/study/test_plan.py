import copy
import dataclasses
import functools
import re

import pytest
import yaml

from padprobe.probe.options import ProbeOptions, default_of
from padprobe.study import cell
from padprobe.study.plan import read_study
from tests.study.conftest import OPTIONS, edit, write


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


def options_of(name):
    return lambda s: s["encoders"][name]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda s: None, set()),
        (lambda s: s.update(num_workers=2, cache_gb=1.0), set()),
        (lambda s: options_of("sod-valid")(s).update(readouts=[{"kernel_size": 1}]), set()),
        (lambda s: options_of("untrained-valid")(s).update(padding="zeros"), set()),
        (lambda s: s.update(anchors={"some": "thing"}), set()),
        (lambda s: s.update(readouts=[{"kernel_size": 7}]), set()),
        (lambda s: s.update(limit_test=4), {"probe"}),
        (lambda s: s["test"].update(white="white"), {"probe"}),
        (lambda s: options_of("sod-valid")(s)["scores"].update(more={}), {"scores"}),
        (lambda s: options_of("sod-valid")(s).update(seeds=[1]), {"training", "scores", "probe"}),
        (
            lambda s: options_of("sod-valid")(s)["overrides"].update({"trainer.max_epochs": 1}),
            {"training", "scores", "probe"},
        ),
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
    write(path, {**yaml.safe_load(path.read_text()), "data": "data.yaml"})
    write(tmp_path / "data.yaml", {"image_size": 32})
    before = keys(study)
    assert keys(study) == before
    write(tmp_path / "data.yaml", {"image_size": 64})
    assert keys(study).items().isdisjoint(before.items())


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
        fitted = {"fit": str(tmp_path / "fit.yaml"), "needs": {"ABC": "data.init_args.root"}}
        s["encoders"]["fitted"] = fitted
        s["encoders"]["replaced"] = {**fitted, "overrides": {"data.init_args.root": str(tmp_path)}}

    found = read_study(edit(study, need))
    assert [planned.name for planned in found.cells] == ["untrained-valid", "sod-valid", "replaced"]
    assert all(set(planned.cell.test) == {"scenes", "black"} for planned in found.cells)
    assert set(found.cells[1].cell.scores) == {"scenes"}
    abc = found.missing["ABC"]
    assert abc.startswith("ABC, 5 images ($PADPROBE_DATA/ABC; http://a.b) not found, needed for ")
    rows = ["untrained-valid on abc", "sod-valid on abc", "sod-valid on on ABC", "trained on abc", "fitted on abc"]
    assert abc.split(" needed for ")[1].split(", ") == [*rows, "fitted", "replaced on abc"]
    assert found.missing["W"] == "W ($PADPROBE_DATA/w.pth) not found, needed for trained"


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
    # nor is the way in which an image size is written
    for written, size in (("64x64", 64), ("[64, 64]", 64), ("48x64", (48, 64)), ("[48, 64]", (48, 64))):
        changed = cells(tmp_path / "two.yaml", preset="small", changes=[f"image_size={written}"])["vgg"]
        assert changed.cell.image_size == size
        assert (changed.probe_key == found["vgg"].probe_key) == (size == 64)
    assert changed.how.startswith("48 x 64 px;")
    with pytest.raises(ValueError, match=r"both\.yaml' includes itself"):
        read_study(edit(both, lambda s: s["include"].append("both.yaml")))
    edit(both, lambda s: s["include"].pop())

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
        ({"changes": ["image_size=large"]}, "'untrained-valid': image_size is 'large'; expected pixels: 224 for"),
        ({"changes": ["image_size=[32, 48.5]"]}, r"image_size is \[32, 48\.5\]; expected pixels"),
        ({"changes": ["image_size=[1, 48]"]}, r"image_size is \(1, 48\); expected 2 or more"),
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
        (lambda s: options_of("sod-valid")(s).update(readouts=[{"kernel": 3}]), "'kernel'; did you mean 'kernel_size'"),
        (lambda s: options_of("sod-valid")(s).update(readouts=[{"kernel_size": 4}]), "expected an odd number"),
        (lambda s: options_of("sod-valid")(s).update(readouts=[]), "'sod-valid': readouts is empty"),
        (lambda s: options_of("sod-valid")(s).update(seeds=[]), "'sod-valid': seeds is empty"),
        (lambda s: options_of("sod-valid")(s).update(targets=["H", "[H]"]), r"'sod-valid': unknown target '\[H\]'"),
        (lambda s: options_of("sod-valid")(s).update(padding=[]), "padding of encoder 'sod-valid' is empty"),
        (lambda s: options_of("sod-valid")(s).update(position_embedding=[]), "position_embedding .* is empty"),
        (lambda s: options_of("sod-valid")(s).update(needs={"ABC": "data.root"}), "unknown data 'ABC'"),
        (lambda s: s.update(epochs=0), "epochs is 0; expected 1 or more"),
        (lambda s: s.update(tables=[{"title": "no name"}]), "lacks name"),
        (lambda s: s.update(claims=[{"says": "no name"}]), "none: state exactly one of|lacks name"),
        (lambda s: s.update(references={"fil": "a.csv"}), "'fil'; did you mean 'file'"),
        (lambda s: s["encoders"].update({"a/b": options_of("sod-valid")(s)}), "'a/b' has a name with odd characters"),
        (lambda s: s["encoders"].update({"..": {"encoder": "x", "weights": "y"}}), "odd characters"),
    ],
)
def test_bad_studies_are_named(study, change, message):
    with pytest.raises(ValueError, match=message):
        read_study(edit(study, change))


NONSENSE = [None, True, -1, 1.5, float("nan"), "", "text", [], [1], [[]], {}, {"a": 1}, {5: {}}, {"a": {"b": 1}}]
KEYS = ["include", "encoders", "data", "presets", "tables", "claims", "references", "title", "needs", "scores", "test"]
KEYS += [
    "readouts",
    "seeds",
    "overrides",
    "fit",
    "padding",
    "image_size",
    "encoders.sod-valid",
    "encoders.sod-valid.test",
]


def refusal(path):
    try:
        read_study(path)
    except ValueError as error:
        return str(error)


@pytest.mark.parametrize("key", KEYS)
def test_nonsense_is_refused_in_one_line_or_is_no_nonsense(study, key):
    content = yaml.safe_load(study.read_text())
    *parents, last = key.split(".")
    for value in NONSENSE:
        changed = copy.deepcopy(content)
        place = functools.reduce(lambda tree, name: tree[name], parents, changed)
        place[last] = value
        message = refusal(write(study, changed))
        assert not message or re.fullmatch(r"study 'study': .+", message)  # one line


@pytest.mark.parametrize("value", [*NONSENSE, "{"], ids=repr)
def test_a_file_that_holds_no_study_is_refused(tmp_path, value):
    assert re.match(r"study 'study': ", refusal(write(tmp_path / "study.yaml", value)))


def test_names_of_runs_are_unique(study):
    def seeds(s):
        s["encoders"] = {name: options_of("untrained-valid")(s) for name in ("a", "a-seed0")}
        s["encoders"]["a"] = {**s["encoders"]["a"], "seeds": [0, 1]}

    def modes(s):
        s["encoders"] = {name: options_of("untrained-valid")(s) for name in ("a", "a-zeros")}
        s["encoders"]["a"] = {**s["encoders"]["a"], "padding": ["zeros", "valid"]}

    def context(s):
        s["encoders"] = {name: options_of("sod-valid")(s) for name in ("a", "a-context")}
        s["encoders"]["a"] = {**s["encoders"]["a"], "context": True}

    def groups(s):
        modes(s)
        s["encoders"]["a"]["seeds"] = [0, 1]
        s["encoders"]["a-zeros"]["seeds"] = [7]

    content = study.read_text()
    for change, name in ((seeds, "a-seed0"), (modes, "a-zeros"), (context, "a-context"), (groups, "a-zeros")):
        study.write_text(content)
        with pytest.raises(ValueError, match=f"would both have a run called '{name}'|would both be called '{name}'"):
            read_study(edit(study, change))


def test_a_list_of_paddings_is_one_run_per_mode(study):
    def grid(s):
        for name in ("untrained-valid", "sod-valid"):
            s["encoders"][name.removesuffix("-valid")] = s["encoders"].pop(name)
        s["encoders"]["sod"]["overrides"] = {}
        del s["encoders"]["untrained"]["padding"]
        s["encoders"]["alone"] = {"encoder": "smp:vgg11", "padding": "circular", "pair": "mine"}
        s["padding"] = ["zeros", "valid"]

    found = cells(edit(study, grid))
    assert list(found) == ["untrained-zeros", "untrained-valid", "sod-zeros", "sod-valid", "alone"]
    assert [planned.cell.padding for planned in found.values()] == ["zeros", "valid", "zeros", "valid", "circular"]
    assert [planned.cell.pair for planned in found.values()] == ["untrained", "untrained", "sod", "sod", "mine"]
    assert [planned.group for planned in found.values()] == list(found)
    # the padding of a training is its config's
    key = "model.init_args.encoder_padding"
    assert [found[name].cell.overrides for name in ("sod-zeros", "sod-valid")] == [{key: "zeros"}, {key: "valid"}]
    assert found["sod-zeros"].training_key != found["sod-valid"].training_key


def test_a_list_of_position_embeddings_is_one_run_per_mode_of_one_pair(study):
    def grid(s):
        s["encoders"] = {"vit": {"encoder": "torchvision:vit_b_16", "position_embedding": ["learned", "none"]}}

    found = cells(edit(study, grid))
    assert [(name, p.cell.position_embedding, p.cell.pair) for name, p in found.items()] == [
        ("vit-learned", "learned", "vit"),
        ("vit-none", "none", "vit"),
    ]
    found = cells(edit(study, lambda s: s["encoders"]["vit"].update(padding=["zeros", "valid"])))
    assert list(found) == ["vit-zeros-learned", "vit-zeros-none", "vit-valid-learned", "vit-valid-none"]


def test_a_study_takes_exactly_the_probes_options_and_its_own_each_with_help(study):
    probe = {field.name: field for field in dataclasses.fields(ProbeOptions)}
    own = {
        "encoder",
        "options",
        "weights",
        "padding",
        "position_embedding",
        "pair",
        "fit",
        "overrides",
        "needs",
        "scores",
        "task",
    }
    assert set(cell.OPTIONS) == {*probe, *own, "train", "test"}
    assert all(field.metadata["help"] for field in cell.OPTIONS.values())
    assert all(set(field.metadata["changes"]) <= {"training", "scores", "probe"} for field in cell.OPTIONS.values())

    def state_all(s):  # the default of each, at the top
        for name, field in cell.OPTIONS.items():
            if name not in ("readouts", "pair", *s):
                s[name] = default_of(field)

    before = keys(study)
    assert keys(edit(study, state_all)) == before


def test_encoders_are_settled_where_they_are_loaded_untrained(study, tmp_path):
    def more(s):
        s["encoders"]["loaded"] = {"encoder": "torchvision:vgg16", "weights": "IMAGENET1K_V1"}
        s["encoders"]["checkpoint"] = {"encoder": "last.ckpt"}
        s["encoders"]["unsettled"] = {"encoder": "torchvision:vgg16", "settle": False}

    found = cells(edit(study, more))
    assert [name for name, planned in found.items() if planned.cell.settle] == ["untrained-valid"]


def test_tables_claims_and_references_of_included_studies_are_joined(study, tmp_path):
    row = {"label": "a", "run": "sod-valid"}
    one, two = ({"name": name, "title": name, "rows": [row], "columns": [row]} for name in ("one", "two"))
    claim = {
        "name": "high",
        "says": "it is high",
        "value": {"run": "sod-valid", "stimulus": "black", "target": "H"},
        "above": 0.5,
    }
    (tmp_path / "more").mkdir()
    more = {"tables": [one], "claims": [claim], "references": {"file": "paper.csv", "tolerance": 0.1}, "title": "More"}
    write(tmp_path / "more" / "more.yaml", more)
    edit(study, lambda s: s.update(include=["more/more.yaml"], tables=[two, one], text="So it is."))
    found = read_study(study)
    assert found.about == {
        "title": "More",
        "text": "So it is.",
        "tables": [one, two],
        "claims": [claim],
        "tolerance": 0.1,
    }
    assert found.references == [str(tmp_path / "more" / "paper.csv")]
    assert cells(study)["sod-valid"].cell.scores == {"scenes": {}}


def test_a_value_inside_an_option_can_be_changed_by_its_dotted_key(study):
    changes = ["encoders.sod-valid.overrides.trainer.max_epochs=7", "encoders.untrained-valid.options.depth=1"]
    found = cells(study, changes=changes)
    assert found["sod-valid"].cell.overrides["trainer.max_epochs"] == 7
    assert found["untrained-valid"].cell.options == {**OPTIONS, "depth": 1}


def test_the_papers_studies_are_valid_at_every_scale(data):
    for preset in (None, "laptop", "paper"):
        found = read_study("configs/study/paper/paper.yaml", preset)
        assert set(found.missing) <= {"ECSSD", "DUT-OMRON", "VOC", "RESNET152"}
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


def test_a_training_gets_the_paths_of_the_data_that_it_needs(study, tmp_path, monkeypatch):
    monkeypatch.delenv("PADPROBE_DATA", raising=False)
    (tmp_path / "elsewhere").mkdir()

    def need(s):
        s["data"] = {"ABC": {"path": "$PADPROBE_DATA/ABC"}}
        s["encoders"]["sod-valid"]["needs"] = {"ABC": ["data.init_args.train", "data.init_args.test"]}

    edit(study, need)
    assert "sod-valid" not in cells(study)
    planned = cells(study, changes=[f"data.ABC.path={tmp_path}/elsewhere"])["sod-valid"]
    paths = {planned.cell.overrides[f"data.init_args.{part}"] for part in ("train", "test")}
    assert paths == {f"{tmp_path}/elsewhere"}
    assert "elsewhere" not in planned.how


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


def test_a_padding_is_stated_once(study):
    edit(study, lambda s: s.update(encoders={"s": {**options_of("sod-valid")(s), "padding": "zeros"}}))
    for _ in range(2):
        with pytest.raises(ValueError, match=r"'s' states padding and overrides model\.init_args\.encoder_padding"):
            read_study(study)
        edit(study, lambda s: s.update(padding=["zeros", "valid"]))
        edit(study, lambda s: s["encoders"]["s"].pop("padding", None))


def test_an_alias_inside_its_own_anchor_is_refused(study):
    study.write_text(study.read_text() + "options: &a {b: *a}\n")
    assert "refers to itself" in refusal(study)
