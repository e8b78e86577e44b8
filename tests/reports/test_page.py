"""The page of a run: what is in it against the run's folder, and what a browser makes of it."""

import base64
import gzip
import json
import os
import re
import shutil
from html.parser import HTMLParser

import numpy as np
import pytest
from browser import chromium
from toy import toy_model, toy_tokenizer

from hf_dynsparse import sparse_layers
from hf_dynsparse.reports.facts import LOG_FILE
from hf_dynsparse.reports.page import write
from hf_dynsparse.reports.page.collect import collect_run
from hf_dynsparse.reports.page.curves import MAX_POINTS, log_curves
from hf_dynsparse.reports.page.maps import code_maps
from hf_dynsparse.reports.page.texts import duration, large
from hf_dynsparse.reports.page.write import names_of, watch_page, write_page
from hf_dynsparse.reports.pictures.blocks import KINDS, changes
from hf_dynsparse.topology.frames import Frame, write_frame


NAME = '<b>bold</b> & "run"'
LAYER = "bert.encoder.layer.0.intermediate.dense"
OTHER = "bert.encoder.layer.1.attention.self.key"
STEPS = [0, 4, 8]
KERNEL = {
    "backend": "native",
    "backward": True,
    "block_shape": [4, 4],
    "nnzb": 32,
    "shape": [64, 32],
    "why": "</script>",
}


def logged(step):
    costs = {"dynsparse/tokens": 100 * step, "dynsparse/tokens_per_second": 50.0, "dynsparse/flops": 1e9 * step}
    return {"step": step, "loss": 8.0 / step, "learning_rate": 1e-3, "dynsparse/coverage": 0.25 + step / 100, **costs}


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """As of a run of eight steps, one checkpoint and two updates. Not to be changed."""
    folder = tmp_path_factory.mktemp("runs") / NAME.replace("/", "_")
    model, draw = toy_model(), np.random.default_rng(0)
    log = [logged(step) for step in range(1, 9)]
    log += [{"step": 8, "eval_loss": 1.25, "eval_context_gain": float("nan"), "eval_runtime": 1.0}]
    callbacks = {"KernelCallback": {"args": {}, "attributes": {"choices": [{**KERNEL, "why": "</script>"}]}}}
    for place, entries in ((folder / "checkpoint-4", log[:4]), (folder, log)):
        model.save_pretrained(place)
        toy_tokenizer().save_pretrained(place)
        state = {"global_step": len(entries), "log_history": entries, "stateful_callbacks": callbacks}
        (place / "trainer_state.json").write_text(json.dumps(state))
    summary = {"steps": 8, "tokens": 800, "eval_loss": 1.25, "seconds": 16.0, "arguments": {"optim": "<i>"}}
    (folder / "summary.json").write_text(json.dumps(summary))
    for update, step in enumerate(STEPS):
        maps = {name: draw.random(layer.grid) < 0.3 for name, layer in sparse_layers(model).items()}
        first = maps.pop(LAYER)
        write_frame(folder, Frame(LAYER, update, step, first), maps)
    return folder


@pytest.fixture(scope="module")
def page(run_folder, tmp_path_factory):
    file = tmp_path_factory.mktemp("page") / "new folder" / "report.html"
    write_page([run_folder], file, ["w1 [MASK] w3"])
    return file.read_text(encoding="utf-8")


def data_of(page):
    return json.loads(re.search(r'<script type="application/json" id="data">(.*)</script>', page)[1])


def unpacked(coded):
    rows, columns = coded["grid"]
    bits = np.frombuffer(gzip.decompress(base64.b64decode(coded["bits"])), dtype=np.uint8)
    frames = np.bitwise_xor.accumulate(bits.reshape(len(coded["steps"]), -1), axis=0)
    return np.unpackbits(frames, axis=1, count=rows * columns).reshape(-1, rows, columns).astype(bool)


def test_the_page_holds_what_the_folder_tells(page, run_folder):
    (run,) = data_of(page)["runs"]
    assert run["name"] == run_folder.name
    rows = dict(run["summary"])
    expected = {"state": "finished", "sparsity": "0.7500", "block": "4 x 4", "steps": "8", "tokens": "800"}
    expected |= {"training FLOPs": "8 G", "evaluation loss": "1.25", "training time": "16 s", "DOF coverage": "33.0%"}
    assert rows.items() >= expected.items()
    curves = {curve["key"]: curve["points"] for curve in run["curves"]}
    assert curves["loss"][1] == [2, 200, 4.0, 2e9, 4.0]
    assert curves["eval_loss"] == [[8, None, None, None, 1.25]]
    assert "eval_context_gain" not in curves  # of no number there is no picture
    assert [layer[0] for layer in run["layers"]] == list(run["maps"]) == list(sparse_layers(toy_model()))
    assert run["kernels"][1] == ["backward", "64 x 32", "4 x 4", "32", "", "", "", "", "native", "</script>"]
    headings, cells = run["masks"]
    assert headings == ["text", "step 4", "end"]
    assert cells[0] == "w1 [MASK] w3"
    assert re.fullmatch(r"(“\S+” \d%(, )?){3}", cells[1])
    assert run["settings"][0] == ["optim", "<i>"]


def test_block_maps_survive_their_code(page, run_folder):
    coded = data_of(page)["runs"][0]["maps"][OTHER]
    draw = np.random.default_rng(0)
    for place, (update, step) in enumerate(enumerate(STEPS)):
        maps = {name: draw.random(layer.grid) < 0.3 for name, layer in sparse_layers(toy_model()).items()}
        assert (coded["updates"][place], coded["steps"][place]) == (update, step)
        np.testing.assert_array_equal(unpacked(coded)[place], maps[OTHER])


def test_without_a_history_checkpoints_tell(run_folder, tmp_path):
    run = shutil.copytree(run_folder, tmp_path / "run", ignore=shutil.ignore_patterns("topology_history"))
    coded = collect_run(run, "run", 10**6, ["w1 [MASK]"])["maps"]
    for name, layer in sparse_layers(toy_model()).items():
        assert (coded[name]["steps"], coded[name]["updates"]) == ([4, 8], [-1, -1])
        np.testing.assert_array_equal(unpacked(coded[name])[1], layer.layout.to_mask().numpy())


def test_what_finds_no_room_is_named():
    draw = np.random.default_rng(0)
    layers = {name: [Frame(name, 0, step, draw.random((64, 64)) < 0.5) for step in STEPS] for name in "abc"}
    size = len(code_maps({"a": layers["a"][-1:]}, 10**6)[0]["a"]["bits"])
    coded, left_out = code_maps(layers, 9 * size // 2)
    assert [(name, each["left_out"], each["steps"]) for name, each in coded.items()] == [
        ("a", 0, STEPS),
        ("b", 2, [8]),
    ]
    assert left_out == ["c"]
    np.testing.assert_array_equal(unpacked(coded["b"])[0], layers["b"][-1].block_map)


class Balance(HTMLParser):
    """The elements that are open, and all addresses."""

    def __init__(self):
        super().__init__()
        self.open, self.addresses = [], []

    def handle_starttag(self, tag, attrs):
        self.addresses += [value for name, value in attrs if name in ("src", "href", "action")]
        if tag not in ("meta", "input", "link", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_stands_alone(page):
    parser = Balance()
    parser.feed(page)
    assert parser.open == []
    assert parser.addresses == []
    assert set(re.findall(r"https?://[\w./]+", page)) == {"http://www.w3.org/2000/svg"}  # a name, not an address
    assert not re.search(r"url\(|@import|fetch\(|XMLHttpRequest|\b(NaN|Infinity)\b", page.replace("Number.", ""))


def test_names_are_text(page):
    assert "<title>&lt;b&gt;bold&lt;_b&gt; &amp; &quot;run&quot;</title>" in page
    assert "<b>" not in page
    assert "<i>" not in page
    assert page.count("</script>") == 2


def test_colours_are_those_of_the_pictures(page):
    assert [colour.upper() for colour in colours_of(page, "light")] == list(KINDS.values())


def test_long_logs_are_thinned():
    (curve,) = log_curves({"step": step, "loss": 1.0} for step in range(1, 2502))
    assert len(curve["points"]) <= MAX_POINTS
    assert curve["points"][-1][0] == 2501
    assert {
        round(later[0] - earlier[0]) for earlier, later in zip(curve["points"], curve["points"][1:], strict=False)
    } == {3}


def test_numbers_that_people_read():
    assert [large(number) for number in (None, 0, 950, 61_440, 10_240_000, 3.1457e13)] == [
        *(None, "0", "950", "61.4 K", "10.2 M", "3.15e+13")
    ]
    assert [duration(number) for number in (None, 12.61, 2774, 12_010)] == [None, "12.6 s", "46 min", "3 h 20 min"]


def test_names_tell_runs_apart(tmp_path):
    runs = [tmp_path / "sst2" / "seed-0", tmp_path / "mrpc" / "seed-0"]
    assert names_of(runs) == ["sst2/seed-0", "mrpc/seed-0"]
    assert names_of(runs[:1]) == ["seed-0"]
    with pytest.raises(ValueError, match=r"shows each run once. Got .*seed-0 twice. Name it once"):
        names_of([*runs, runs[0] / "." / ""])


def test_a_run_that_goes_on(run_folder, tmp_path, monkeypatch):
    """The page follows it: nothing, a history, a checkpoint, its end; then it is left alone."""
    going, output, pages = tmp_path / "run", tmp_path / "report.html", []
    going.mkdir()
    (going / ".run.lock").write_text(f"process {os.getpid()} on another since today")

    def pass_time(seconds):
        assert seconds == 0.5
        pages.append(data_of(output.read_text()))
        if len(pages) == 1:
            shutil.copytree(run_folder / "topology_history", going / "topology_history")
            entries = "".join(json.dumps(logged(step)) + "\n" for step in (1, 2, 3))
            (going / LOG_FILE).write_text(entries[:-9])  # the third is being written
        if len(pages) == 2:
            shutil.copytree(run_folder / "checkpoint-4", going / "checkpoint-4")
            (going / LOG_FILE).unlink()
        if len(pages) == 3:
            shutil.copytree(run_folder, going, dirs_exist_ok=True)
            (going / ".run.lock").unlink()

    monkeypatch.setattr(write.time, "sleep", pass_time)
    written = []
    watch_page([going], output, 0.5, written=lambda: written.append(output.exists()))
    pages.append(data_of(output.read_text()))
    assert written == [True]
    assert [page["reload"] for page in pages] == [0.5, 0.5, 0.5, None]
    runs = [page["runs"][0] for page in pages]
    assert [dict(run["summary"])["state"] for run in runs] == [*["going on"] * 3, "finished"]
    assert [dict(run["summary"])["steps"] for run in runs] == ["", "2", "4", "8"]
    assert [len(run["curves"]) > 0 for run in runs] == [False, True, True, True]
    assert [run["maps"].get(OTHER, {}).get("steps") for run in runs] == [None, STEPS, STEPS, STEPS]


def test_damaged_and_empty_folders_are_named(run_folder, tmp_path):
    with pytest.raises(ValueError, match=r"must have left something in its folder. Got .*nowhere without"):
        write_page([tmp_path / "nowhere"], tmp_path / "report.html")
    again = shutil.copytree(run_folder, tmp_path / "again")
    for entry in ({"step": 1, "dynsparse/tokens": "many"}, {"step": 1, "dynsparse/tokens_per_second": 5.0}):
        (again / "trainer_state.json").write_text(json.dumps({"log_history": [entry]}))
        with pytest.raises(ValueError, match=r" must be .*Got .*\. Load an intact"):
            write_page([again], tmp_path / "report.html")
    shutil.copy(run_folder / "trainer_state.json", again)
    (again / "model.safetensors").write_bytes(b"half")
    with pytest.raises(ValueError, match=r"model.safetensors, which is none"):
        write_page([again], tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


SHOWN = """(() => {
  const canvas = document.querySelector("canvas");
  const copy = new OffscreenCanvas(canvas.width, canvas.height).getContext("2d", { willReadFrequently: true });
  copy.drawImage(canvas, 0, 0);
  const pixels = [...copy.getImageData(0, 0, canvas.width, canvas.height).data];
  return { caption: document.querySelector("#map figcaption").textContent, pixels, hash: location.hash };
})()"""

# Once the caption tells of a step, which it does when the blocks are drawn.
WAIT = """new Promise((done) => setInterval(() => {{
  const drawn = document.querySelector("#curves svg");  // charts come after maps
  if (drawn && document.querySelector("#map figcaption")?.textContent.startsWith("step {},")) done();
}}, 20))"""


def test_in_a_browser(page, run_folder, tmp_path):
    file = tmp_path / "report.html"
    file.write_text(page, encoding="utf-8")
    first = "bert.encoder.layer.0.attention.self.query"
    cases = [(1280, "light", "", first, 8, "tokens")]
    cases += [(400, "dark", f"#axis=flops&layer={OTHER}&frame=0", OTHER, 0, "training FLOPs")]
    with chromium(tmp_path / "profile") as browser:
        for width, scheme, fragment, layer, step, axis in cases:
            size = {"width": width, "height": 1500, "deviceScaleFactor": 1, "mobile": width < 500}
            browser.call("Emulation.setDeviceMetricsOverride", **size)
            browser.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
            browser.call("Page.navigate", url="about:blank")
            browser.call("Page.navigate", url=f"{file.as_uri()}{fragment}")
            browser.run(WAIT.format(step))
            assert browser.run("document.querySelector('h1').textContent") == run_folder.name
            assert browser.run("document.documentElement.scrollWidth - document.documentElement.clientWidth") == 0
            charts = browser.run("[...document.querySelectorAll('#curves svg')].map((chart) => chart.ariaLabel)")
            assert charts == [f"loss against {axis}", f"DOF coverage against {axis}"]  # the others never change
            assert browser.run("document.querySelector('#layer').value") == layer
            seen = {step: browser.run(SHOWN)}
            browser.run("document.querySelector('#frame').focus()")
            browser.run("document.querySelector('#frame').value = 0")
            for kind in ("keyDown", "keyUp"):
                key = {"key": "ArrowRight", "code": "ArrowRight", "windowsVirtualKeyCode": 39}
                browser.call("Input.dispatchKeyEvent", type=kind, **key)
            browser.run(WAIT.format(4))
            seen[4] = browser.run(SHOWN)
            assert "frame=1" in seen[4]["hash"]
            browser.run("document.querySelector('#play').click()")
            browser.run(WAIT.format(8))
            seen[8] = browser.run(SHOWN)
            assert "frame" not in seen[8]["hash"]  # the latest, whichever it is after a reload

            colours = np.array([[*bytes.fromhex(colour[1:]), 255] for colour in colours_of(page, scheme)])
            frames = [Frame(layer, 0, 0, block_map) for block_map in unpacked(data_of(page)["runs"][0]["maps"][layer])]
            for frame, step_of_it, (newborn, ever_active) in zip(frames, STEPS, changes(frames), strict=True):
                kinds = np.select([newborn, frame.block_map, ever_active], [3, 2, 1], 0)
                if step_of_it in seen:
                    np.testing.assert_array_equal(seen[step_of_it]["pixels"], colours[kinds].ravel())
        assert browser.complaints == []


def colours_of(page, scheme):
    """What a block may be, from the least to the most, as the style sheet paints it."""
    styles = page.split("prefers-color-scheme: dark")[scheme == "dark"]
    return [re.search(rf"--{kind}: (#\w+);", styles)[1] for kind in ("never", "before", "active", "newborn")]
