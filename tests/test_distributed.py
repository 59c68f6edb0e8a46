"""The corpus as it is distributed: face pictures in folders and archives, containers of all kinds, a report that misses nothing."""
import os
import struct
import tracemalloc
import zipfile
from dataclasses import replace
from fractions import Fraction

import av
import cv2
import numpy as np
import pytest
from clips import annotate, beeps, draw_face, wall, write_video
from corpora import COUNT, UTF8, archive, clip, faces, jpg, limited, root, small_tree, trim  # noqa: F401 (fixtures)

from sage_nb.affwild2 import Corpus, Trial, _list_archive, read_crop_files, video_info
from sage_nb.backbones import save_encoder
from sage_nb.cli import main
from sage_nb.core import DataError, read_arrays
from sage_nb.corruption import FAMILIES, plan_stretches, seeded
from sage_nb.encoders import AudioEncoder, VisualEncoder
from sage_nb.features import encode_corpus, prepare_corpus, read_prepared
from sage_nb.media import look_closely, read_crops, read_frames, read_sound, read_trial
from sage_nb.suite import _look_again, encode_corrupted


def crops_of(root):
    return {trial.id: trial.crops for trial in Corpus(root).trials()}


# --- where face pictures lie

@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("before", [b"", b"#!/bin/sh\n" * 9])
@pytest.mark.parametrize("name", ["cropped_aligned.zip", "cropped_aligned_new_50_vids.ZIP", "faces/cropped_aligned/batch1.zip"])
def test_archives_are_read_where_they_are(root, name, before, wide):
    archive(faces("two_left") + faces("two_right", [3]), root / name, before, wide)
    crops = crops_of(root)
    assert crops["two_left"].numbers.tolist() == [1, 2, 5] and crops["two_right"].numbers.tolist() == [3] and crops["Köln"] is None
    assert [(number, content) for number, content in read_crop_files(crops["two_left"])] == [(n, jpg(10 * n)) for n in (1, 2, 5)]
    assert [round(frame.image.mean()) for frame in read_crops(crops["two_left"])] == [10, 20, 50]


def test_an_archive_made_by_python_is_read(root):
    with zipfile.ZipFile(root / "cropped_aligned.zip", "w") as file:
        for number, method in ((7, zipfile.ZIP_STORED), (3, zipfile.ZIP_DEFLATED)):
            with file.open(zipfile.ZipInfo(f"Köln/{number:05d}.jpg"), "w", force_zip64=True) as entry:
                entry.write(jpg(number))
            file.writestr(f"two_left/{number:05d}.jpg", jpg(number), method)
    crops = crops_of(root)
    assert [*read_crop_files(crops["Köln"])] == [*read_crop_files(crops["two_left"])] == [(3, jpg(3)), (7, jpg(7))]


@pytest.mark.parametrize("name, flags", [("Köln".encode(), UTF8), ("Köln".encode(), 0), ("Köln".encode("cp437"), 0)])
def test_names_in_archives(root, name, flags):
    archive([(b"a/" + name + b"/00001.jpg", jpg(), flags, 8), (b"a\\two_left\\00002.jpg", jpg(), 0, 0)], root / "cropped_aligned.zip")
    crops = crops_of(root)
    assert crops["Köln"].numbers.tolist() == [1] and crops["two_left"].numbers.tolist() == [2]


def test_what_is_no_face_picture_is_left_out(root):
    names = ["00000.jpg", "1.jpg", "000001.jpg", "00001.JPG", "00002.png", "x.jpg", ".DS_Store", "._00001.jpg", "00003.jpg"]
    for folder in (root / "cropped_aligned" / "Köln",):
        folder.mkdir(parents=True)
        for name in names:
            (folder / name).write_bytes(jpg())
    archive([(f"b/two_left/{name}".encode(), jpg()) for name in names] + [(b"b/two_left/", b"", 0, 0), (b"__MACOSX/two_right/00001.jpg", b"")],
            root / "cropped_aligned.zip")
    crops = crops_of(root)
    for trial in ("Köln", "two_left"):
        assert crops[trial].numbers.tolist() == [1, 3] and crops[trial].others == 5 and len([*read_crop_files(crops[trial])]) == 2
    assert crops["two_right"] is None


def test_a_folder_comes_before_an_archive_and_a_later_entry_before_an_earlier(root):
    archive(faces("Köln", [1]) + faces("two_left", [4]) + [(b"cropped_aligned/two_left/00004.jpg", jpg(200))] + faces("two_left", [6]), root / "cropped_aligned.zip")
    (root / "cropped_aligned" / "batch2" / "Köln").mkdir(parents=True)
    (root / "cropped_aligned" / "batch2" / "Köln" / "00009.jpg").write_bytes(jpg(99))
    (root / "cropped_aligned" / "round").symlink_to(root / "cropped_aligned")
    crops = crops_of(root)
    assert [*read_crop_files(crops["Köln"])] == [(9, jpg(99))] and [*read_crop_files(crops["two_left"])] == [(4, jpg(200)), (6, jpg(60))]
    table = Corpus(root).check().set_index("trial")
    assert "face pictures in 2 places, of which" in table.loc["Köln", "oddities"] and "batch2" in table.loc["Köln", "oddities"]


# --- archives that cannot be believed

def test_every_single_wrong_bit_of_a_directory_is_found(root):
    "No face is lost or handed to another frame or person unsaid."
    path = archive(faces("two_left") + faces("two_right", (1, 3, 4)) + [(b"cropped_aligned/two_left/notes.txt", b"-")], root / "cropped_aligned.zip")
    content = path.read_bytes()
    true = {"two_left": {n: jpg(10 * n) for n in (1, 2, 5)}, "two_right": {n: jpg(10 * n) for n in (1, 3, 4)}}
    corpus, begin, said = Corpus(root), content.index(b"PK\1\2"), 0
    bits = np.random.default_rng(0).permutation(8 * (len(content) - begin))[:800]
    for bit in bits.tolist():
        data = bytearray(content)
        data[begin + bit // 8] ^= 1 << bit % 8
        path.write_bytes(data)
        corpus.faults, corpus.crops = [], {}
        corpus._find_crops([], [path])
        try:
            if corpus.faults:
                raise DataError(corpus.faults[0])
            read = {trial: dict(file for crops in corpus.crops.get(trial, []) for file in read_crop_files(crops)) for trial in true}
            assert read == true
        except DataError:
            said += 1
    assert len(bits) / 3 < said < len(bits)


@pytest.mark.parametrize("count, well", [(3, True), (3 + 65536, True), (2, False), (4, False), (0, False)])
def test_the_number_of_entries_may_be_written_modulo_65536(root, count, well):
    archive(faces("two_left"), root / "cropped_aligned.zip", count=count % 65536)
    corpus = Corpus(root)
    assert bool(corpus.faults) != well and (crops_of(root)["two_left"] is not None) == well


@pytest.mark.parametrize("count", [65535, 65536])
@pytest.mark.parametrize("program", ["python", "modulo"])
def test_as_many_entries_as_the_old_format_can_count(tmp_path, count, program):
    entries = [(b"t/%05d.jpg" % number, b"x", 0, 0) for number in range(1, count + 1)]
    if program == "modulo":
        archive(entries, tmp_path / "a.zip", count=count % 65536)
    else:
        with zipfile.ZipFile(tmp_path / "a.zip", "w") as file:
            for name, content, *_ in entries:
                file.writestr(name.decode(), content)
    [crops] = _list_archive(tmp_path / "a.zip")["t"]
    assert len(crops.numbers) == count and not crops.fault and not crops.twice


def test_an_archive_said_to_be_all_directory(root):
    "60 GiB of nothing take neither memory nor time."
    size, path = 60 << 30, root / "cropped_aligned.zip"
    with path.open("wb") as file:
        file.truncate(size)
        file.seek(size)
        file.write(struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, 5, 5, size, 0) + struct.pack("<4sLQL", b"PK\6\7", 0, size, 1)
                   + struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0))
    tracemalloc.start()
    try:
        assert "directory is damaged" in Corpus(root).faults[0] and tracemalloc.get_traced_memory()[1] < 32 << 20
    finally:
        tracemalloc.stop()


def test_one_bad_entry_concerns_one_trial(root, tmp_path):
    archive(faces("two_left") + faces("two_right") + [(b"cropped_aligned/Ko/00001.jpg", jpg(), 1, 8), (b"cropped_aligned/two_right/00009.jpg", jpg(), 1, 8)],
            root / "cropped_aligned.zip")
    assert [bool(trial.fault) for trial in Corpus(root).trials()] == [False, False, True]
    assert [*prepare_corpus(Corpus(root), tmp_path / "out", workers=1, skip_broken=True)] == ["Köln", "two_left"]
    table = Corpus(root).check()
    assert (table.problem != "").sum() == 2 and table.problem[table.trial == ""].str.contains("'Ko' are encrypted").sum() == 1

LONG = b"\0" * (1 << 24) + b"\0"
CONCERNED = ("parent", "inside", "root", "drive", "backslash", "dots", "encrypted", "method", "large", "larger")
HOSTILE = {
    "parent": (dict(entries=[(b"../two_left/00001.jpg", jpg())]), "leads out of the archive"),
    "inside": (dict(entries=[(b"cropped_aligned/../../two_left/00001.jpg", jpg())]), "leads out of the archive"),
    "root": (dict(entries=[(b"/etc/two_left/00001.jpg", jpg())]), "leads out of the archive"),
    "drive": (dict(entries=[(b"C:\\two_left\\00001.jpg", jpg())]), "leads out of the archive"),
    "backslash": (dict(entries=[(b"..\\..\\two_left\\00001.jpg", jpg())]), "leads out of the archive"),
    "dots": (dict(entries=[(b"two_left/..", b"")]), "leads out of the archive"),
    "zero": (dict(entries=[(b"two\0_left/00001.jpg", jpg())]), "cannot be printed"),
    "bell": (dict(entries=[(b"two_left\x07/00001.jpg", jpg())]), "cannot be printed"),
    "latin": (dict(entries=[(b"K\xf6ln/00001.jpg", jpg(), UTF8, 8)]), "said to be UTF-8"),
    "encrypted": (dict(entries=[(b"two_left/00001.jpg", jpg(), 1, 8)]), "encrypted"),
    "method": (dict(entries=[(b"two_left/00001.jpg", jpg(), 0, 12)]), "packed by method 12"),
    "large": (dict(entries=[(b"two_left/00001.jpg", LONG)]), "is said to have 16777217 bytes"),
    "larger": (dict(entries=faces("two_left"), length=2**62, wide=True), "is said to have 4611686018427387904 bytes"),
    "count": (dict(entries=faces("two_left"), count=9), "directory is damaged"),
    "counts": (dict(entries=faces("two_left"), count=2**63, wide=True), "directory is damaged"),
    "size": (dict(entries=faces("two_left"), size=2**31), "not a complete zip archive"),
    "sizes": (dict(entries=faces("two_left"), size=2**62, wide=True), "not a complete zip archive"),
    "words": (b"no archive", "not a complete zip archive"), "nothing": (b"", "not a complete zip archive"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_archives_that_cannot_be_believed(root, case, capsys):
    "A fault of the trials that it concerns: of one, of nobody known, or of all; the report says what reading says."
    about, fault = HOSTILE[case]
    path = root / "cropped_aligned.zip"
    path.write_bytes(about) if isinstance(about, bytes) else archive(**{"entries": faces("two_right"), **about, "path": path})
    before = sorted(root.parent.rglob("*"))
    concerned = [] if case in ("zero", "bell", "latin") else ["two_left"] if case in CONCERNED else ["Köln", "two_left", "two_right"]
    found, said = [], set()
    for trial in Corpus(root).trials():
        try:
            read_trial(trial)
        except DataError as error:
            found.append(trial.id)
            said.add(str(error))
    table = Corpus(root).check()
    assert found == concerned == table.trial[(table.problem != "") & (table.trial != "")].tolist()
    assert main(["check", str(root)]) == 2
    told = capsys.readouterr()
    assert len(told.err.splitlines()) == 1 and told.err[9:-1] in (said or {told.err[9:-1]})
    assert str(path) in told.err and fault in told.err and ";" in told.err
    assert f"3 trials, 0 clean, {3 - len(found)} with oddities, {len(found)} unusable" in told.out
    assert sorted(root.parent.rglob("*")) == before


BOMB = b"\0" * (40 << 20)


@pytest.mark.parametrize("entries, lie", [
    ([(b"two_left/00001.jpg", BOMB)], dict(length=1000)),  # 40 MiB behind a small number
    ([(b"two_left/00001.jpg", jpg())], dict(offset=10**6)),
    ([(b"two_left/00001.jpg", jpg())], dict(offset=11)),
    ([(b"two_left/00001.jpg", jpg())], dict(length=3)),
    ([(b"two_left/00001.jpg", jpg())], dict(packed=30)),
    ([(b"two_left/00001.jpg", jpg(), 0, 0)], dict(length=2000, packed=2000)),
])
def test_a_damaged_entry_is_named(root, entries, lie):
    archive(entries, root / "cropped_aligned.zip", **lie)
    told = "do not agree" if "offset" in lie else "picture 1, at byte .* is damaged"
    trial = next(trial for trial in Corpus(root).trials() if trial.id == "two_left")
    tracemalloc.start()
    try:
        with pytest.raises(DataError, match=f"{told}; copy the archive again"):
            read_trial(trial)
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()


def huge_jpg():
    content = bytearray(jpg())
    at = content.index(b"\xff\xc0")
    content[at + 5 : at + 9] = b"\xff\xff\xff\xff"
    return bytes(content)


@pytest.mark.parametrize("content", [b"", b"\xff\xd8", jpg()[:-30], jpg()[:40], huge_jpg(), b"\x89PNG" + jpg(), cv2.imencode(".png", np.zeros((9, 9)))[1].tobytes(),
                                     b"\xff\xd8" + b"\xff\xe0\0\0" * 100 + b"\xff\xd9"])
def test_a_face_picture_that_is_none(root, content):
    (root / "cropped_aligned" / "Köln").mkdir(parents=True)
    (root / "cropped_aligned" / "Köln" / "00002.jpg").write_bytes(content)
    trial = Corpus(root).trials()[0]
    with pytest.raises(DataError, match="00002.jpg is no complete jpg picture .*; take the organisers' file again"):
        read_trial(trial)
    assert main(["check", str(root)]) == 1 and main(["check", str(root), "--decode"]) == 2


@pytest.mark.parametrize("names, kind", [
    (["cropped_aligned/"], "no face pictures"), (["Cropped_Aligned/"], "no face pictures"),
    (["cropped_aligned/Köln/0001.jpg", "cropped_aligned/Köln/1.jpg"], "face pictures that cannot be used"),
    (["cropped_aligned.zip/b/Köln/0001.jpg"], "face pictures that cannot be used"), (["cropped_aligned.zip/inner.zip"], "no face pictures"),
    (["CROPPED_ALIGNED/Köln/00001.JPG"], None), (["cropped_aligned/Köln/00002.jpeg"], None), (["Cropped_aligned.ZIP/Köln/00002.Jpg"], None),
])
def test_face_pictures_that_cannot_be_used_are_told(root, names, kind, capsys):
    for name in names:
        packed, _, inner = name.partition(".zip/" if ".zip" in name else ".ZIP/")
        if inner:
            archive([(inner.encode(), jpg(90))], root / f"{packed}.zip")
            continue
        path = root / name
        (path if name.endswith("/") else path.parent).mkdir(parents=True, exist_ok=True)
        if path.suffix:
            path.write_bytes(jpg(90))
    table = Corpus(root).check().set_index("trial")
    assert main(["check", str(root)]) == 1
    assert {odd for odd, _ in table.loc["two_left", "odd"]} == {"no face pictures"}
    assert {odd for odd, _ in table.loc["Köln", "odd"]} == ({kind} if kind else set())
    if not kind:
        data = read_trial(Corpus(root).trials()[0])
        assert data["visual_ok"].sum() == 1 and data["crops"][data["visual_ok"]].mean() == pytest.approx(90, abs=1)
    if "inner.zip" in names[0]:
        assert "other files among face pictures" in capsys.readouterr().out


def test_pictures_that_come_twice_are_told(root):
    archive(faces("Köln", (1, 2)) + faces("Köln", (2, 3)), root / "cropped_aligned.zip")
    assert "1 face picture there once more" in Corpus(root).check().set_index("trial").loc["Köln", "oddities"]


def test_links_to_the_same_faces_count_once(root):
    (root / "cropped_aligned" / "batch" / "Köln").mkdir(parents=True)
    (root / "cropped_aligned" / "batch" / "Köln" / "00001.jpg").write_bytes(jpg())
    (root / "cropped_aligned_2").symlink_to("cropped_aligned")
    (root / "cropped_aligned_3").symlink_to("cropped_aligned/batch")
    corpus = Corpus(root)
    assert len(corpus.crops["Köln"]) == 1 and corpus.check().set_index("trial").loc["Köln", "oddities"] == ""


# --- what is no regular file

SPECIAL = {"folder": lambda path: path.mkdir(), "dangling": lambda path: path.symlink_to("nowhere"), "looping": lambda path: path.symlink_to(path.name),
           "pipe": os.mkfifo}
PLACES = {"x.txt": (0, None), "subjects.csv": (2, "subjects.csv"), "VA_Estimation_Challenge/Train_Set/q.txt": (2, "q.txt"), "cropped_aligned.zip": (2, "cropped_aligned.zip"),
          "cropped_aligned/Köln/00001.jpg": (1, "00001.jpg"), "videos/two.mp4": (2, "two.mp4")}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", SPECIAL)
def test_what_is_no_file_is_waited_for_by_nobody(root, place, kind):
    code, told = PLACES[place]
    path = root / place
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    SPECIAL[kind](path)
    with limited(10):
        if kind == "pipe" or code == 0:
            assert main(["check", str(root)]) == code
        else:
            main(["check", str(root)])
        for trial in Corpus(root).trials():
            try:
                read_trial(trial)
            except DataError as error:
                assert told is not None and ";" in str(error)


# --- by number, never by count

@pytest.mark.parametrize("rows", [COUNT - 3, COUNT, COUNT + 2])
def test_row_picture_and_face_of_one_number_belong_together(tmp_path, rows):
    "Faces in an archive, some missing, some beyond the end; every face tells its number, every row as well."
    video = write_video(tmp_path / "t.mp4", [wall(size=32)] * COUNT, np.arange(COUNT) / 25)
    annotation = annotate(tmp_path / "t.txt", [(-5, -5) if number in (2, 3) else (number / 100, -number / 100) for number in range(1, rows + 1)])
    length, numbers = max(rows, COUNT), [1, 3, 4, 8, 9, *range(COUNT, 20)]
    found = [number for number in numbers if number <= length]
    kept = {}
    for kind in ("folder", "archive"):
        root = tmp_path / kind
        if kind == "archive":
            archive([(f"x/t/{number:05d}.jpg".encode(), jpg(10 * number)) for number in reversed(numbers)], root / "cropped_aligned.zip")
        for number in numbers if kind == "folder" else ():
            path = root / "cropped_aligned" / "t" / f"{number:05d}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(jpg(10 * number))
        (root / "VA_Estimation_Challenge" / "Train_Set").mkdir(parents=True)
        (root / "VA_Estimation_Challenge" / "Train_Set" / "t.txt").write_bytes(annotation.read_bytes())
        (root / "t.mp4").write_bytes(video.read_bytes())
        [trial] = Corpus(root).trials()
        data = kept[kind] = read_trial(trial)
        assert data["frame"].tolist() == list(range(1, length + 1)) and data["frame"][data["visual_ok"]].tolist() == found
        assert np.abs(data["crops"].mean((1, 2, 3)) - 10 * data["frame"])[data["visual_ok"]].max() < 2 and not data["crops"][~data["visual_ok"]].any()
        assert data["frame"][data["valid"]].tolist() == [number for number in range(1, rows + 1) if number not in (2, 3)]
        assert data["va"][data["valid"], 0] == pytest.approx(data["frame"][data["valid"]] / 100)
        assert data["time"] == pytest.approx(np.arange(length) / 25) and data["score"].tolist() == data["visual_ok"].tolist()
        assert np.isnan(data["box"][data["visual_ok"]]).all() and not data["box"][~data["visual_ok"]].any()
    assert all(np.array_equal(kept["folder"][name], kept["archive"][name], equal_nan=name == "box") for name in kept["folder"])


def test_faces_of_two_people_are_their_own(root):
    archive(faces("two_left", [1]) + faces("two_right", [7]), root / "cropped_aligned.zip")
    for trial in Corpus(root).trials():
        if trial.side:
            data = read_trial(trial)
            assert data["frame"][data["visual_ok"]].tolist() == [1 if trial.side == "left" else 7]


def test_given_faces_are_corrupted_where_they_are(tmp_path):
    "All the way from an archive to corrupted features: no face is looked for, what was not touched stays as it was."
    root, count = tmp_path / "corpus", 75
    write_video(root / "t.mp4", [wall(size=32)] * count, np.arange(count) / 25)
    annotate(root / "VA_Estimation_Challenge" / "Validation_Set" / "t.txt", [[0.1, 0.2]] * count)
    (root / "VA_Estimation_Challenge" / "Train_Set").mkdir()
    picture = [cv2.imencode(".jpg", draw_face(wall(), mouth=number % 7 / 7)[25:137, 25:137])[1].tobytes() for number in range(count)]
    archive([(b"t/%05d.jpg" % number, picture[number - 1]) for number in range(1, count + 1) if number % 10], root / "cropped_aligned.zip")
    corpus = Corpus(root)
    prepare_corpus(corpus, tmp_path / "prepared", workers=1)
    for kind, net in (("visual", VisualEncoder()), ("audio", AudioEncoder())):
        save_encoder(tmp_path / "encoders" / f"{kind}.safetensors", net)
    encode_corpus(tmp_path / "prepared", tmp_path / "encoders", tmp_path / "store", workers=1)
    encode_corrupted(corpus, tmp_path / "prepared", tmp_path / "encoders", tmp_path / "store", tmp_path / "suite", workers=1)
    clean, _ = read_arrays(tmp_path / "store" / "t.safetensors")
    assert clean["visual_ok"].tolist() == [number % 10 > 0 for number in range(1, count + 1)]
    for family in (name for name, about in FAMILIES.items() if about.level == "media" and about.modality == "visual"):
        for severity in (1, 2, 3):
            worse, _ = read_arrays(tmp_path / "suite" / f"{family}-{severity}" / "t.safetensors")
            assert np.array_equal(worse["visual_ok"], clean["visual_ok"]), "a given face stays found"
            changed = (worse["visual"] != clean["visual"]).any(1)
            assert not changed[~worse["corrupted"]].any() and changed[worse["corrupted"] & clean["visual_ok"]].mean() > 0.9
    data = read_prepared(tmp_path / "prepared" / "t.safetensors")
    [(_, seen)] = _look_again(corpus.trials()[0], data, [("occlusion", 1)], {"occlusion": plan_stretches(data["time"], seeded(0, "test"))}, 0, tmp_path)
    same = (seen["crops"][:] == data["crops"][:]).all(-1)[seen["changed"]]
    assert 0.3 < same.mean() < 1, "an object covers a part of the picture, and the rest of it stays where it was"


# --- damaged containers

def test_more_memory_than_there_is_is_not_asked_for(tmp_path):
    late = write_video(tmp_path / "late.mp4", [wall(size=32)] * 50, np.arange(50) / 25, np.zeros(2 * 44100), pauses=[(44032, 5 * 3600)])
    with pytest.raises(DataError, match="sound is stamped over more than 4 hours"):
        read_sound(late)
    with av.open(str(tmp_path / "large.avi"), "w") as container:
        video = container.add_stream("mjpeg", rate=25, width=8208, height=8208, pix_fmt="yuvj420p")
        container.mux(video.encode(av.VideoFrame(8208, 8208, "yuvj420p")))
        container.mux(video.encode())
    for read in (video_info, lambda path: list(read_frames(path))):
        with pytest.raises(DataError, match="large.avi"):
            read(tmp_path / "large.avi")


def test_a_face_model_reaches_the_trial(tmp_path):
    video = write_video(tmp_path / "t.mp4", [draw_face(wall())] * 3, np.arange(3) / 25)
    trial = Trial("t", "train", video, None, None, "s", "t")
    with pytest.raises(DataError, match="no such face model"):
        read_trial(trial, face_model=tmp_path / "absent.onnx")
    assert read_trial(replace(trial, side="left"))["visual_ok"].shape == (3,)
