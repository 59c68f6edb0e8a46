"""What one looks at when a video has been predicted: the page in a real browser, and the annotated video."""
import os
import re
import subprocess
import tracemalloc
from dataclasses import replace
from fractions import Fraction

import av
import numpy as np
import pandas as pd
import pytest
import browser
from browser import context, page  # noqa: F401
from clips import beeps, wall
from clips import write_video as write_clip
from conftest import ROOT
from corpora import trim

from sage_nb import pages
from sage_nb.affwild2 import video_info
from sage_nb.core import DataError
from sage_nb.media import read_frames, read_sound
from sage_nb.pages import write_overlay, write_page
from sage_nb.sample import RATE, write_video

UNEVEN = np.cumsum(np.r_[0.0, np.resize([1, 1, 2, 1, 3], 59)]) / 25
STEP = 3  # levels of grey from picture to picture


def level(number):
    return 30 + STEP * number


def numbered(count, height=90, width=160):
    "Pictures whose grey tells their number, from 1."
    return [np.full((height, width, 3), level(number), np.uint8) for number in range(1, count + 1)]


def predicted(times, face=None, trained_on="The model was trained on my recordings.", demonstration=False, box=(40, 20, 50, 60), flip=1.0):
    "A table of smooth curves."
    times = np.asarray(times)
    table = pd.DataFrame(dict(frame=np.arange(1, len(times) + 1), time=times, valence=0.5 * flip * np.sin(times), arousal=0.5 * flip * np.cos(times)))
    for axis in ("valence", "arousal"):
        table[f"{axis}_low"], table[f"{axis}_high"] = table[axis] - 0.2, table[axis] + 0.3
    table["reliability_visual"], table["reliability_audio"] = 0.7, 0.4
    table["face_found"], table["voice_heard"] = np.arange(len(times)) % 10 != 3, times > 0.5
    for name, value in zip(("x", "y", "width", "height"), box):
        table[f"face_{name}"] = np.where(table.face_found, value, np.nan)
    table.attrs = dict(model="sage", run="runs/mine", trained_on=trained_on, demonstration=demonstration, face=face)
    return table


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    "A clip of uneven rate with sound, as the sample's videos are written."
    path = tmp_path_factory.mktemp("clip") / "clip.mp4"
    write_video(path, numbered(60), UNEVEN, Fraction(25), (0.1 * np.sin(np.arange(round(UNEVEN[-1] * RATE)) / 9)).astype(np.float32))
    return path


def opened(page, path):
    "Go to the page and wait until its video can be shown, however busy the machine is."
    page.set_default_timeout(120_000)
    page.goto(path.as_uri())
    page.wait_for_function("document.getElementById('video').readyState >= 2")


def shown(page):
    "Number of the picture that is in the readout, that of the picture in the video, where the video's clock is, and the cursor (0 to 1)."
    page.wait_for_function("!video.seeking && wanted === null && painted !== null")
    return page.evaluate("""() => new Promise(done => setTimeout(() => {
      const canvas = Object.assign(document.createElement('canvas'), {width: 8, height: 8});
      const ink = canvas.getContext('2d');
      ink.drawImage(video, 0, 0, 8, 8);
      done([+document.getElementById('now-time').textContent.match(/picture (\\d+)/)[1], (ink.getImageData(4, 4, 1, 1).data[0] - %d) / %d,
            video.currentTime, parseFloat(document.getElementById('cursor').style.left) / 100]);
    }, 150))""" % (level(0), STEP))


def rows_of(page, selector="#readout > div"):
    return page.locator(selector).all_inner_texts()


# --- the browser

def test_without_a_browser_tests_are_skipped_or_fail_where_one_is_required(tmp_path, monkeypatch):
    stub = tmp_path / "chromium"
    stub.write_text("#!/bin/sh\necho install me >&2\nexit 1\n")
    stub.chmod(0o755)
    monkeypatch.setattr(browser, "NAMES", ("no-such-browser", str(stub)))
    monkeypatch.setenv("SAGE_NB_BROWSER", "required")
    with pytest.raises(pytest.fail.Exception, match="no browser that starts"):
        browser.executable()
    monkeypatch.delenv("SAGE_NB_BROWSER")
    with pytest.warns(UserWarning, match="NOT TESTED"), pytest.raises(pytest.skip.Exception):
        browser.executable()
    stub.write_text("#!/bin/sh\n")
    assert browser.executable() == str(stub)


@pytest.mark.parametrize("starts", [True, False])
def test_continuous_integration_requires_a_browser(tmp_path, starts):
    for name, body in dict(id="echo 0", make='echo "browser: $SAGE_NB_BROWSER"; echo "$@"', chromium=f"exit {int(not starts)}", **{"chromium-browser": "exit 1", "google-chrome": "exit 1"},
                           **{"apt-get": 'echo "$@" >>"$0.log"'}).items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    done = subprocess.run([ROOT / ".ci/run", "VENV=x"], env=os.environ | dict(PATH=f"{tmp_path}:{os.environ['PATH']}", SAGE_NB_BROWSER=""), capture_output=True, text=True, check=True)
    assert done.stdout == "browser: required\ntest VENV=x\n"
    assert (tmp_path / "apt-get.log").exists() == ("WILL FAIL" in done.stderr) == (not starts)


# --- the page

def test_the_cursor_runs_with_the_video(clip, tmp_path, page):
    write_page(tmp_path / "page.html", predicted(UNEVEN), clip)
    opened(page, tmp_path / "page.html")
    page.evaluate("""() => {
      window.seen = [];
      const note = (_, about) => {
        requestAnimationFrame(() => seen.push([about.mediaTime, video.currentTime, document.getElementById('now-time').textContent,
                                               parseFloat(document.getElementById('cursor').style.left) / 100]));
        video.requestVideoFrameCallback(note);
      };
      video.requestVideoFrameCallback(note);
    }""")
    page.keyboard.press("Space")
    page.wait_for_function("document.getElementById('video').currentTime > 1.5")
    assert page.locator("#play").inner_text() == "Pause"
    page.keyboard.press("Space")
    page.wait_for_function("document.getElementById('video').paused")
    seen = page.evaluate("seen")
    numbers = [int(text.split()[3]) for _, _, text, _ in seen]
    assert len(set(numbers)) > 10 and numbers == sorted(numbers)
    length = UNEVEN[-1] * 60 / 59
    for (media, clock, _, cursor), number in zip(seen, numbers):
        at = np.searchsorted(UNEVEN, media + 1e-3)  # pictures begun
        assert number - at in (0, 1, 2) and clock - UNEVEN[number - 1] < 0.4, "a picture may follow before the page is looked at"
        assert cursor == pytest.approx(UNEVEN[number - 1] / length, abs=1e-3)
    assert page.errors == [] and [url.partition(":")[0] for url in page.requests] == ["file", "blob"]


def test_clicks_and_keys_go_to_the_picture(clip, tmp_path, page):
    write_page(tmp_path / "page.html", predicted(UNEVEN), clip)
    opened(page, tmp_path / "page.html")
    place, length = page.locator("#curves").bounding_box(), UNEVEN[-1] * 60 / 59
    for share in (0.37, 0.9, 0.02, 0.61):
        page.mouse.click(place["x"] + share * place["width"], place["y"] + 50)
        expected = np.searchsorted(UNEVEN, share * length + 5e-4, "right")
        number, picture, clock, cursor = shown(page)
        assert number == expected and abs(picture - number) < 0.6 and abs(cursor - share) < 0.05
        assert UNEVEN[number - 1] <= clock < UNEVEN[number - 1] + 0.01
    for key, change in dict(ArrowRight=1, ArrowLeft=-1).items():
        page.keyboard.press(key)
        assert shown(page)[0] == (expected := expected + change)
    assert abs(shown(page)[1] - expected) < 0.6
    assert expected == shown(page)[0]
    page.mouse.move(place["x"] + 0.2 * place["width"], place["y"] + 30)
    page.mouse.down()
    for share in np.linspace(0.2, 0.8, 30):  # quicker than the video follows
        page.mouse.move(place["x"] + share * place["width"], place["y"] + 30)
    page.mouse.up()
    number, picture, *_ = shown(page)
    assert number == np.searchsorted(UNEVEN, 0.8 * length, "right") and abs(picture - number) < 0.6
    page.keyboard.press("End")
    assert shown(page)[0] == 60
    page.locator("#play").focus()
    page.keyboard.press("PageDown")  # which may scroll the page, away from the slider
    assert shown(page)[0] == 60
    page.locator("#curves").focus()
    page.keyboard.press("PageDown")
    assert shown(page)[0] == np.searchsorted(UNEVEN, UNEVEN[-1] - length / 10 + 5e-4, "right")
    page.keyboard.press("Home")
    assert shown(page)[0] == 1
    page.keyboard.press("PageUp")
    assert shown(page)[0] == np.searchsorted(UNEVEN, length / 10 + 5e-4, "right")
    page.keyboard.press("Home")
    assert shown(page)[0] == 1 and page.locator("#curves").get_attribute("aria-valuetext").startswith("0.00 seconds, valence +0.00, arousal +0.50")
    assert page.errors == []


def test_the_readout_says_what_the_table_says(clip, tmp_path, page):
    table = predicted(UNEVEN)
    write_page(tmp_path / "page.html", table, clip)
    opened(page, tmp_path / "page.html")
    for number in (1, 4, 30):
        page.evaluate(f"jump({UNEVEN[number - 1]})")
        assert shown(page)[0] == number
        row, text = table.iloc[number - 1], " ".join(rows_of(page)).replace("\n", " ").replace("\u2212", "-")
        for value in ("valence", "arousal"):
            assert f"{value} {row[value]:+.2f} 90 %: {row[f'{value}_low']:+.2f} to {row[f'{value}_high']:+.2f}" in text
        assert "sight 0.70" in text and "sound 0.40" in text
        assert ("no face found" if number == 4 else " face found") in text and ("no voice heard" if row.time < 0.5 else " voice heard") in text
        box, screen = page.locator(".box"), page.locator("#screen").bounding_box()
        assert box.is_visible() == row.face_found
        if row.face_found:
            place = box.bounding_box()
            assert (place["x"] - screen["x"]) / screen["width"] == pytest.approx(40 / 160, abs=0.01)
            assert (place["y"] - screen["y"]) / screen["height"] == pytest.approx(20 / 90, abs=0.01)
            assert place["width"] / screen["width"] == pytest.approx(50 / 160, abs=0.01)
    page.locator("#boxed").click()
    assert not box.is_visible()


def test_one_of_several_faces_is_chosen(clip, tmp_path, page):
    tables = [predicted(UNEVEN, face=1), predicted(UNEVEN, face=2, box=(100, 20, 50, 60), flip=-1.0)]
    write_page(tmp_path / "page.html", tables, clip)
    opened(page, tmp_path / "page.html")
    assert [text for text in page.locator(".box span").all_inner_texts()] == ["face 1", "face 2"] and page.locator("#who").is_visible()
    arousal, curve = page.locator("#now-arousal"), "document.querySelectorAll('canvas')[1].toDataURL()"
    before = arousal.inner_text(), page.evaluate(curve)
    page.locator("#face").select_option(index=1)
    assert arousal.inner_text() == "\u22120.50" and before[0] == "+0.50" and page.evaluate(curve) != before[1]
    assert page.locator(".box.chosen").inner_text() == "face 2"
    page.locator(".box").first.click()
    assert (arousal.inner_text(), page.evaluate(curve)) == before and page.locator("#face").input_value() == "0"


def test_a_model_without_intervals_and_reliability_has_none_shown(clip, tmp_path, page):
    table = predicted(UNEVEN)
    for name in ("valence_low", "valence_high", "arousal_low", "arousal_high", "reliability_visual", "reliability_audio"):
        table[name] = np.nan
    table.loc[0, "valence"] = np.nan
    write_page(tmp_path / "page.html", table, clip)
    opened(page, tmp_path / "page.html")
    text = page.locator("main").inner_text()
    assert "90 %" not in text and "reliability" not in text and "NaN" not in text and page.locator("canvas").count() == 5
    assert page.locator("#curves").get_attribute("aria-valuetext") == "0.00 seconds, valence not known, arousal +0.50" and page.locator("video").get_attribute("aria-label")
    assert page.errors == []


def test_hostile_names_are_text(clip, tmp_path, page):
    name = "<img src=x onerror=alert(1)> \"quoted\" 'so' & <\u29f8script>.mp4"
    (tmp_path / name).write_bytes(clip.read_bytes())
    about = "</script><script>alert(2)</script><b id=planted>bold</b>"
    table = predicted(UNEVEN, trained_on=about, face="</script><i id=planted>")
    table.attrs["run"] = table.attrs["model"] = about
    write_page(tmp_path / "page.html", [table, table], tmp_path / name)
    page.on("dialog", lambda dialog: page.errors.append(dialog.message))
    opened(page, tmp_path / "page.html")
    assert page.locator("h1").inner_text() == name == page.title()
    assert about in page.locator(".note").first.inner_text() and page.locator("#what").inner_text().count(about) == 2
    assert page.locator("#planted").count() == 0 and page.errors == []


def test_a_file_name_that_is_no_text_is_shown_escaped(clip, tmp_path, page):
    name = tmp_path / b"caf\xe9\n.mp4".decode(errors="surrogateescape")
    name.write_bytes(clip.read_bytes())
    write_page(tmp_path / "page.html", predicted(UNEVEN), name)
    opened(page, tmp_path / "page.html")
    assert page.locator("h1").inner_text() == r"caf\udce9\n.mp4"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_overflows_on_a_phone_and_texts_can_be_read(clip, tmp_path, page, scheme):
    write_page(tmp_path / "page.html", [predicted(UNEVEN, face=1), predicted(UNEVEN, face=2)], clip)
    page.emulate_media(color_scheme=scheme)
    page.set_viewport_size(dict(width=360, height=740))
    opened(page, tmp_path / "page.html")
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    beyond = """() => [...document.querySelectorAll('main *')].filter(e => { const place = e.getBoundingClientRect();
                       return place.left < -0.5 || place.right > 360.5; }).map(e => e.outerHTML.slice(0, 80))"""
    assert page.evaluate(beyond) == []
    contrast = page.evaluate("""() => {
      const light = text => { const parts = text.match(/[\\d.]+/g).slice(0, 3).map(v => v / 255).map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
                              return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]; };
      const ground = light(getComputedStyle(document.body).backgroundColor);
      return ['h1', '#what', '#hint', '#now-valence', ...[...document.querySelectorAll('.legend b')]].map(e => {
        const ink = light(getComputedStyle(typeof e === 'string' ? document.querySelector(e) : e).color);
        return (Math.max(ink, ground) + 0.05) / (Math.min(ink, ground) + 0.05); });
    }""")
    assert min(contrast) > 4.5  # WCAG 2.2, level AA, for text


def test_it_is_light_on_paper(clip, tmp_path, page):
    write_page(tmp_path / "page.html", predicted(UNEVEN), clip)
    page.emulate_media(color_scheme="dark")
    opened(page, tmp_path / "page.html")
    look = """() => { const style = e => getComputedStyle(document.querySelector(e)), canvas = document.querySelector('canvas'), dots = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data;
      const blue = []; for (let i = 0; i < dots.length; i += 4) if (dots[i + 3] > 250 && dots[i + 2] > dots[i] + 90) blue.push(dots[i]);
      return [style('html').colorScheme, style('body').backgroundColor, style('body').color, Math.min(...blue) < 40]; }"""
    assert page.evaluate(look) == ["dark", "rgb(18, 20, 23)", "rgb(232, 234, 237)", False] and page.locator("#controls").is_visible()
    page.emulate_media(media="print", color_scheme="dark")
    page.wait_for_function(f"({look})()[3]", polling=50)  # the curves are drawn again a moment later
    assert page.evaluate(look) == ["light", "rgb(255, 255, 255)", "rgb(28, 32, 36)", True] and not page.locator("#controls").is_visible()
    assert page.pdf().startswith(b"%PDF")


def test_the_warning_is_at_the_top(clip, tmp_path, page):
    write_page(tmp_path / "page.html", predicted(UNEVEN, trained_on="It was trained on drawn faces.", demonstration=True), clip)
    opened(page, tmp_path / "page.html")
    note = page.locator(".note").first
    assert note.inner_text() == "A demonstration. It was trained on drawn faces." and "warning" in note.get_attribute("class")
    assert note.bounding_box()["y"] < page.locator("video").bounding_box()["y"]
    bare = predicted(UNEVEN)
    bare.attrs = {}
    write_page(tmp_path / "bare.html", bare, clip)
    opened(page, tmp_path / "bare.html")
    assert "not recorded" in page.locator(".note").first.inner_text()


@pytest.mark.parametrize("name", ["moving.avi", "late.mp4", "trimmed.mp4", "turned.mp4", "mute.mp4", "odd.avi", "stream.ts"])
def test_videos_of_all_kinds_are_in_step(tmp_path, page, name):
    times = np.arange(50) / 25
    about = dict(sound=beeps([1.0], 2.0))
    pictures = numbered(50, *((161, 91) if name == "odd.avi" else (90, 160)))
    if name == "late.mp4":
        times, about = times + 1.2, dict(sound=beeps([2.0], 3.0, 1.8), sound_start=1.8)
    if name in ("turned.mp4", "mute.mp4"):
        about = dict(turned=90) if name == "turned.mp4" else {}
    video = write_clip(tmp_path / name.replace("trimmed", "long").replace(".ts", ".mp4"), pictures, times, **about)
    if name == "trimmed.mp4":
        video = trim(video, 0.4)
    if name == "stream.ts":
        video = remuxed(video, tmp_path / name)
    info = video_info(video)
    frames = [frame for frame in read_frames(video)]
    table = predicted([frame.time for frame in frames], box=(10, 20, 40, 50))
    write_page(tmp_path / "page.html", table, video)
    opened(page, tmp_path / "page.html")
    for row in (0, 7, len(frames) - 1):
        page.evaluate(f"jump({frames[row].time - frames[0].time})")
        number, picture, *_ = shown(page)
        assert number == row + 1 and abs(picture - (frames[row].image.mean() - level(0)) / STEP) < 0.8
    size = page.evaluate("[video.videoWidth / video.videoHeight, video.duration]")
    assert size[0] == pytest.approx(info.width / info.height, abs=0.02) and size[1] == pytest.approx(info.duration, abs=0.15)
    place, screen = page.locator(".box").bounding_box(), page.locator("#screen").bounding_box()
    assert (place["x"] - screen["x"]) / screen["width"] == pytest.approx(10 / info.width, abs=0.01)
    assert page.locator("#mute").is_visible() == info.has_sound and page.errors == []


def remuxed(video, path):
    "The same streams in another container."
    with av.open(str(video)) as source, av.open(str(path), "w") as target:
        streams = {stream.index: target.add_stream_from_template(stream) for stream in source.streams}
        for packet in source.demux():
            if packet.size:
                packet.stream = streams[packet.stream_index]
                target.mux(packet)
    return path


@pytest.fixture(scope="module")
def long(tmp_path_factory):
    "Five minutes at 20 pictures a second."
    path, times = tmp_path_factory.mktemp("long") / "long #1 50%?.mp4", np.arange(6000) / 20
    write_video(path, (np.full((32, 32, 3), k % 200, np.uint8) for k in range(len(times))), times, Fraction(20), None)
    return path, predicted(times, box=(1, 2, 8, 8))


def test_a_peak_of_one_picture_is_seen_among_thousands(long, tmp_path, page):
    video, table = long
    table = table.assign(valence=-0.5, valence_low=np.nan, valence_high=np.nan)
    table.loc[3000, "valence"] = 0.9
    write_page(tmp_path / "page.html", table, video)
    page.set_viewport_size(dict(width=360, height=740))  # some eighteen rows a pixel
    opened(page, tmp_path / "page.html")
    above = """() => { const canvas = document.querySelectorAll('canvas')[0], blue = [0, 0x72, 0xb2];
      const dots = canvas.getContext('2d').getImageData(30, 5, canvas.width - 30, 20).data, columns = new Set();
      for (let i = 0; i < dots.length; i += 4) if (dots[i + 3] > 60 && blue.every((v, k) => Math.abs(dots[i + k] - v) < 40)) columns.add(30 + i / 4 % (canvas.width - 30));
      return [...columns].map(x => x / canvas.width); }"""
    columns = page.evaluate(above)
    assert columns and max(abs(column - 0.5) for column in columns) < 0.02
    page.locator("#span").select_option(value="10")
    assert page.evaluate("view.to - view.from") == pytest.approx(10) and page.evaluate(above) == []
    page.evaluate("jump(150)")
    assert page.evaluate("[view.from, view.to]") == pytest.approx([145, 155]) and len(page.evaluate(above)) and shown(page)[0] == 3001
    page.locator("#curves").click(position=dict(x=0.9 * page.evaluate("curves.clientWidth"), y=50))
    assert shown(page)[0] == pytest.approx(1 + 20 * 154, abs=2)
    assert page.evaluate("[view.from, view.to]") == pytest.approx([149, 159], abs=0.1)


def test_a_video_too_long_for_the_page_is_linked_to(long, tmp_path, page, monkeypatch):
    monkeypatch.setattr(pages, "_LARGEST", 4000)
    video, table = long
    path = tmp_path / "pages" / "page.html"
    write_page(path, table, video)
    assert "film" not in path.read_text().partition("<script>")[0]
    opened(page, path)
    assert "too long to be kept in this page" in page.locator(".note").nth(1).inner_text() and "long #1 50%?.mp4" in page.locator(".note").nth(1).inner_text()
    page.evaluate("jump(100)")
    page.wait_for_function("!video.seeking && painted !== null")
    assert page.evaluate("painted") == pytest.approx(100, abs=1e-3) and "picture 2001 of 6000" in page.locator("#now-time").inner_text()
    moved = tmp_path / "elsewhere" / "much" / "deeper" / "page.html"
    moved.parent.mkdir(parents=True)
    moved.write_text(path.read_text())
    page.goto(moved.as_uri())
    page.wait_for_selector("#trouble:visible")
    assert "has to lie where it lay" in page.locator("#trouble").inner_text()
    page.evaluate("jump(100)")
    assert "picture 2001 of 6000" in page.locator("#now-time").inner_text()


def test_a_video_too_long_that_browsers_do_not_play_lies_beside_the_page(tmp_path, page, monkeypatch):
    monkeypatch.setattr(pages, "_LARGEST", 4000)
    times = np.arange(50) / 25
    video = write_clip(tmp_path / "video.avi", numbered(50), times, beeps([1.0], 2.0))
    write_page(tmp_path / "page.html", predicted(times), video)
    assert video_info(tmp_path / "page.video.mp4").frames == 50
    opened(page, tmp_path / "page.html")
    page.evaluate("jump(1)")
    page.wait_for_function("!video.seeking && painted !== null")
    assert page.evaluate("painted") == pytest.approx(1, abs=1e-3) and "picture 26 of 50" in page.locator("#now-time").inner_text()


def test_a_large_video_is_made_small_enough(tmp_path, monkeypatch):
    rng, times = np.random.default_rng(0), np.arange(15) / 25
    video = write_clip(tmp_path / "video.mp4", [rng.integers(0, 255, (500, 540, 3), dtype=np.uint8) for _ in times], times, beeps([0.3], 0.6))
    assert video.stat().st_size > 1_000_000
    monkeypatch.setattr(pages, "_LARGEST", 120_000)
    write_page(tmp_path / "page.html", predicted(times), video)
    assert (tmp_path / "page.html").stat().st_size < 1.1 * 4 / 3 * 120_000
    first = (tmp_path / "page.html").read_bytes()
    write_page(tmp_path / "page.html", predicted(times), video)
    assert (tmp_path / "page.html").read_bytes() == first


def test_a_link_to_the_video_leads_there_from_a_folder_that_is_a_link(tmp_path, monkeypatch):
    monkeypatch.setattr(pages, "_LARGEST", 1000)
    video = write_video(tmp_path / "video.mp4", numbered(60), np.arange(60) / 25, Fraction(25), None) or tmp_path / "video.mp4"
    (tmp_path / "some/where").mkdir(parents=True)
    (tmp_path / "short").symlink_to(tmp_path / "some/where")
    write_page(tmp_path / "short/page.html", predicted(np.arange(60) / 25), video)
    [link] = re.findall(r'"link": "(.*?)"', (tmp_path / "some/where/page.html").read_text())
    assert (tmp_path / "some/where" / link).resolve() == video.resolve()


# --- the annotated video

@pytest.mark.parametrize("name, times, start", [
    ("even.mp4", np.arange(60) / 25, 0.0), ("uneven.mp4", UNEVEN, 0.0), ("late.mp4", UNEVEN, 0.55), ("all_late.mp4", UNEVEN + 1.3, 1.3),
    ("pictures_late.mp4", UNEVEN + 0.7, 0.0), ("even.avi", np.arange(60) / 25, 0.0), ("stream.ts", np.arange(60) / 25, 0.0)])
def test_pictures_and_sound_keep_their_times(tmp_path, name, times, start):
    flash = 31
    pictures = [wall((230,) * 4 if number == flash else (20,) * 4, 64) for number in range(1, 61)]
    video = write_clip(tmp_path / name.replace(".ts", ".mp4"), pictures, times, beeps([times[flash - 1]], times[-1], start), sound_start=start)
    video = remuxed(video, tmp_path / name) if name.endswith(".ts") else video
    before = list(read_frames(video))
    write_overlay(tmp_path / "overlay.mp4", predicted([frame.time for frame in before], box=(4, 4, 20, 20)), video)
    after = list(read_frames(tmp_path / "overlay.mp4"))
    assert [frame.number for frame in after] == [frame.number for frame in before]
    assert [frame.time for frame in after] == pytest.approx([frame.time for frame in before], abs=1e-3)
    assert [frame.image[200:300, 300:400].mean() for frame in after] == pytest.approx([frame.image[40:].mean() for frame in before], abs=3)
    onset = {}
    for which, path in dict(before=video, after=tmp_path / "overlay.mp4").items():
        sound = read_sound(path)
        onset[which] = sound.start + np.flatnonzero(np.abs(sound.samples) > 0.15)[0] / sound.rate
    assert abs(onset["after"] - onset["before"]) < 0.005 and abs(onset["after"] - after[flash - 1].time) < 0.02


def test_a_trimmed_video_keeps_what_is_shown(tmp_path):
    times = np.arange(60) / 25
    video = trim(write_clip(tmp_path / "long.mp4", numbered(60), times, beeps([1.2], 2.4)), 0.5)
    before = list(read_frames(video))
    assert 40 < len(before) < 55
    write_overlay(tmp_path / "overlay.mp4", predicted([frame.time for frame in before]), video)
    after = list(read_frames(tmp_path / "overlay.mp4"))
    assert [frame.time for frame in after] == pytest.approx([frame.time for frame in before], abs=1e-3)
    assert [frame.image[200:250, 300:400].mean() for frame in after] == pytest.approx([frame.image.mean() for frame in before], abs=3)


@pytest.mark.parametrize("turned, height, width", [(90, 64, 98), (0, 33, 51), (180, 600, 802)])
def test_turned_and_odd_pictures(tmp_path, turned, height, width):
    times = np.arange(5) / 25
    picture = np.zeros((height, width, 3), np.uint8)
    picture[: height // 2] = (200, 60, 60)
    picture[:, : width // 4] = (60, 60, 200)
    video = write_clip(tmp_path / f"video{'.avi' if width % 2 else '.mp4'}", [picture] * 5, times, turned=turned)
    upright = next(read_frames(video)).image
    table = predicted(times, box=(0.25 * upright.shape[1], 0.25 * upright.shape[0], 0.5 * upright.shape[1], 0.5 * upright.shape[0]))
    write_overlay(tmp_path / "overlay.mp4", table, video)
    drawn = next(read_frames(tmp_path / "overlay.mp4"))
    info, scale = video_info(tmp_path / "overlay.mp4"), max(1, 480 / upright.shape[1])
    assert info.turned == 0 and not info.has_sound and info.width % 2 == info.height % 2 == 0 and info.width - upright.shape[1] * scale in (0, 1)
    y, x = (np.array(upright.shape[:2]) * scale).astype(int)
    for v, u in ((0.1, 0.1), (0.1, 0.9), (0.9, 0.1), (0.9, 0.9), (0.4, 0.6)):
        assert np.abs(drawn.image[int(v * y), int(u * x)].astype(int) - upright[int(v * y / scale), int(u * x / scale)]).max() < 12
    edge = drawn.image[int(0.5 * y), int(0.25 * x) - 3 : int(0.25 * x) + 4].astype(int)
    assert (edge[:, 0] + edge[:, 1] - edge[:, 2]).max() > 200  # the box is yellow


@pytest.mark.parametrize("name", ["video.mp4", "video.avi"])
def test_oblong_pixels_are_shown_as_wide_as_they_are(tmp_path, page, name):
    times = np.arange(10) / 25
    video = tmp_path / name
    with av.open(str(video), "w") as container:
        track = container.add_stream("libx264" if name.endswith("mp4") else "mpeg4", rate=25, width=160, height=90, pix_fmt="yuv420p")
        track.codec_context.sample_aspect_ratio = Fraction(2)
        for image in numbered(10):
            container.mux(track.encode(av.VideoFrame.from_ndarray(image)))
        container.mux(track.encode())
    info, table = video_info(video), predicted(times, box=(40, 20, 50, 60))
    assert (info.width, info.height) == (160, 90) and pages._is_played(video, info) == name.endswith("mp4")
    assert pages._shape(video, info) == (320, 90) and pages._shape(video, replace(info, turned=90, width=90, height=160)) == (45, 160)
    write_page(tmp_path / "page.html", table, video)
    opened(page, tmp_path / "page.html")
    screen, box = page.locator("#screen").bounding_box(), page.locator(".box").bounding_box()
    assert screen["width"] / screen["height"] == pytest.approx(320 / 90, abs=0.02) == page.evaluate("video.videoWidth / video.videoHeight")
    assert (box["x"] - screen["x"]) / screen["width"] == pytest.approx(40 / 160, abs=0.01)
    pages._write_small(tmp_path / "small.mp4", video, info, 1e6)
    write_overlay(tmp_path / "overlay.mp4", table, video)
    small, drawn = video_info(tmp_path / "small.mp4"), next(read_frames(tmp_path / "overlay.mp4")).image
    assert (small.width, small.height) == (320, 90) and drawn.shape[1] == 480
    assert abs(np.median(drawn[125, 200:280].astype(int)) - level(1)) < 3 and drawn[150, 200:280].mean() < 60 > drawn[138, 200:280].mean()  # a picture of 480 by 135
    edge = drawn[75, 40 * 3 - 3 : 40 * 3 + 4].astype(int)
    assert (edge[:, 0] + edge[:, 1] - edge[:, 2]).max() > 200  # the box is yellow


def test_text_outside_of_the_picture_is_not_drawn():
    image = np.zeros((60, 80, 3), np.uint8)
    for x, y in ((-500, 30), (500, 30), (10, -500), (10, 500), (-20, -20), (-30, 30)):
        pages._put(image, "face", x, y, 11, np.array([255, 255, 255]))
        assert image.max() == 0, (x, y)
    pages._put(image, "face", 10, 30, 11, np.array([255, 255, 255]))
    assert image.max() > 200


def test_what_is_said_is_drawn(tmp_path, monkeypatch):
    said = []
    put = pages._put
    monkeypatch.setattr(pages, "_put", lambda image, text, *more, **options: (said.append(text), put(image, text, *more, **options)))
    times = np.arange(5) / 25
    video = write_clip(tmp_path / "video.mp4", numbered(5), times)
    tables = [predicted(times, face=1, demonstration=True, trained_on="It was trained on drawn faces."), predicted(times, face=2, flip=-1.0)]
    write_overlay(tmp_path / "overlay.mp4", tables, video)
    assert {"face 1", "face 2", "+0.50", "\u22120.50", "+0.30 to +0.80", "0.70", "0.40", "no face", "no voice", "demonstration, not fit for real faces"} <= set(said)
    assert said.count("no face") == 2 and "0.16 s, picture 5" in said
    with av.open(str(tmp_path / "overlay.mp4")) as file:
        assert file.metadata["comment"] == "It was trained on drawn faces."
    said.clear()
    write_overlay(tmp_path / "overlay.mp4", predicted(times), video)
    assert not any("demonstration" in text or text.startswith("face") for text in said)


@pytest.mark.parametrize("write, name", [(write_page, "out.html"), (write_overlay, "out.mp4")])
def test_it_is_written_whole_or_not_at_all(tmp_path, write, name):
    times = np.arange(200) / 25
    video = write_clip(tmp_path / "whole.avi", numbered(60) * 3 + numbered(20), times, beeps([1.0], 8.0))
    with av.open(str(video)) as container:
        places = [packet.pos for packet in container.demux(video=0) if packet.size]
    broken = tmp_path / "broken.avi"
    broken.write_bytes(video.read_bytes()[: places[100]])
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_text("as it was")
    for wrong, table, message in ((broken, predicted(times), "breaks off"), (tmp_path / "none.mp4", predicted(times), "no such video"),
                                  (video, predicted(times[:150]), "rows are not of these"), (video, predicted(times + 0.1), "rows are not of these")):
        with pytest.raises(DataError, match=message):
            write(tmp_path / "out" / name, table, wrong)
        assert [path.name for path in (tmp_path / "out").iterdir()] == [name] and (tmp_path / "out" / name).read_text() == "as it was"


def test_a_fault_in_the_middle_leaves_nothing(tmp_path, monkeypatch):
    times = np.arange(50) / 25
    video = write_clip(tmp_path / "video.avi", numbered(50), times, beeps([1.0], 2.0))
    frames = read_frames(video)

    def breaking(path):
        yield from (next(frames) for _ in range(30))
        raise DataError(f"{path}: decoding stops after picture 30 (made so); copy the file again")

    monkeypatch.setattr(pages, "read_frames", breaking)
    for write, name in ((write_page, "out.html"), (write_overlay, "out.mp4")):
        frames = read_frames(video)
        with pytest.raises(DataError, match="after picture 30"):
            write(tmp_path / "out" / name, predicted(times), video)
        assert list((tmp_path / "out").iterdir()) == []


def test_the_video_itself_is_not_overwritten(clip):
    before = clip.read_bytes()
    for write in (write_page, write_overlay):
        with pytest.raises(DataError, match="is the video itself"):
            write(clip, predicted(UNEVEN), clip)
    assert clip.read_bytes() == before


def test_memory_does_not_grow_with_the_video(tmp_path):
    "Without sound, of which up to a minute is in memory at once."
    peaks = []
    for count in (100, 200):
        times = np.arange(count) / 25
        video = write_clip(tmp_path / f"{count}.avi", numbered(50, 54, 96) * (count // 50), times)
        table = predicted(times, box=(20, 10, 30, 30))
        for write, name in ((write_overlay, "o.mp4"), (write_page, "p.html")):
            tracemalloc.start()
            write(tmp_path / name, table, video)
            peaks.append(tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()
    assert max(peaks[2] - peaks[0], peaks[3] - peaks[1]) < 1e6, peaks  # the annotated pictures of the longer one take 50 MB more
