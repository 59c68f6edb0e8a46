"""The corpus' layout, the quirks of its annotations, and the rule that row i belongs to picture i."""
import itertools

import numpy as np
import pytest
from clips import annotate, beeps, draw_face, talking, wall, write_video

from sage_nb.affwild2 import Corpus, Trial, read_annotation, read_test_list, reconcile, video_info, write_submission
from sage_nb.core import DataError
from sage_nb.media import read_trial

HEADER = b"valence,arousal\n"


@pytest.mark.parametrize("content, va, valid", [
    (HEADER + b"0.5,-1\n1,0\n", [[0.5, -1], [1, 0]], [1, 1]),
    (HEADER + b"0.5,-1\n1,0", [[0.5, -1], [1, 0]], [1, 1]),  # no line end at the end
    (b"\xef\xbb\xbf" + HEADER + b"0,0\n", [[0, 0]], [1]),  # byte order mark
    (b"valence,arousal\r\n0.5,-1\r\n1,0\r\n", [[0.5, -1], [1, 0]], [1, 1]),  # Windows
    (HEADER + b"0,0\n\n \n\r\n", [[0, 0]], [1]),  # blank lines at the end
    (b"Valence, Arousal\n 0.5 , -1 \n", [[0.5, -1]], [1]),
    (HEADER + b"-5,-5\n0,1\n-5,0.5\n0.5,-5\n-5.0,-5.000\n", [[0, 0], [0, 1], [0, 0], [0, 0], [0, 0]], [0, 1, 0, 0, 0]),
    (HEADER + b"1e-3,-0.0\n", [[0.001, 0]], [1]),
])
def test_annotation_quirks(tmp_path, content, va, valid):
    path = tmp_path / "1.txt"
    path.write_bytes(content)
    read, labelled = read_annotation(path)
    assert read.dtype == np.float32 and read == pytest.approx(np.array(va))
    assert labelled.dtype == bool and labelled.tolist() == [bool(v) for v in valid]


@pytest.mark.parametrize("content, place, fault", [
    (b"", "", "is empty"),
    (b"\n\n", "", "is empty"),
    (HEADER, "", "no row follows"),
    (b"0.1,0.2\n0.1,0.2\n", ", line 1", "not the header"),
    (b"arousal,valence\n0,0\n", ", line 1", "not the header"),
    (b"valence\n0\n", ", line 1", "not the header"),
    (HEADER + b"0,0\n0,1.5\n", ", line 3", "1.5 is neither"),
    (HEADER + b"-1.0001,0\n", ", line 2", "-1.0001 is neither"),
    (HEADER + b"-5,7\n", ", line 2", "7 is neither"),
    (HEADER + b"nan,0\n", ", line 2", "nan is neither"),
    (HEADER + b"inf,0\n", ", line 2", "inf is neither"),
    (HEADER + b"happy,0\n", ", line 2", "'happy,0' is not two numbers"),
    (HEADER + b"0.5\n", ", line 2", "'0.5' is not two numbers"),
    (HEADER + b"0.5,\n", ", line 2", "is not two numbers"),
    (HEADER + b"0,0,0\n", ", line 2", "is not two numbers"),
    (HEADER + b"0;0\n", ", line 2", "is not two numbers"),
    (HEADER + b"0,0\n\n0,0\n", ", line 3", "is not two numbers"),  # blank in the middle: is a row missing?
    ("valence,arousal\n".encode("utf-16"), "", "not UTF-8"),
    (HEADER + b"\xe9,0\n", "", "not UTF-8"),
])
def test_annotations_that_cannot_be_believed(tmp_path, content, place, fault):
    path = tmp_path / "1.txt"
    path.write_bytes(content)
    with pytest.raises(DataError) as error:
        read_annotation(path)
    assert str(error.value).startswith(f"{path}{place}: ") and fault in str(error.value)
    assert ";" in str(error.value) and "\n" not in str(error.value)


def test_reconcile_moves_nothing():
    va, valid = np.arange(8, dtype=np.float32).reshape(4, 2) / 8, np.array([True, False, True, True])
    for frames in (0, 2, 4, 7):
        longer, labelled = reconcile(va, valid, frames)
        assert len(longer) == len(labelled) == max(4, frames)
        assert (longer[:4] == va).all() and (labelled[:4] == valid).all() and not labelled[4:].any()


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return write_video(tmp_path_factory.mktemp("clip") / "clip.mp4", [wall(size=64)] * 10, np.arange(10) / 25, beeps([0.1], 0.4))


def make_corpus(root, clip, train=(), validation=(), test=(), videos=None):
    "A corpus of links to one short clip, ten rows a trial."
    labels = root / "annotations" / "VA_Estimation_Challenge"
    for folder, trials in (("Train_Set", train), ("Validation_Set", validation)):
        (labels / folder).mkdir(parents=True)
        for trial in trials:
            annotate(labels / folder / f"{trial}.txt", [[0.1, 0.2]] * 10)
    if test:
        rows = "".join(f"{trial}/{frame:05d}.jpg,0,0\n" for trial in test for frame in range(1, 11))
        (root / "test_set_example.txt").write_text("image_location,valence,arousal\n" + rows)
    names = {trial.removesuffix("_left").removesuffix("_right") for trial in (*train, *validation, *test)}
    (root / "videos" / "batch1").mkdir(parents=True)
    for name in names if videos is None else videos:
        (root / "videos" / "batch1" / f"{name}.mp4").symlink_to(clip)
    return root


def test_discovery(tmp_path, clip):
    root = make_corpus(tmp_path / "aff", clip, train=["1", "7_left", "7_right", "a_b"], validation=["2"], test=["9-x", "3"])
    (root / "cropped_aligned" / "1").mkdir(parents=True)
    (root / "videos" / "batch1" / "._1.mp4").write_bytes(b"what macOS leaves behind")
    (root / "annotations" / "VA_Estimation_Challenge" / "Train_Set" / "._1.txt").write_bytes(b"\0")
    corpus = Corpus(root)
    assert [trial.id for trial in corpus.trials()] == ["1", "2", "3", "7_left", "7_right", "9-x", "a_b"]
    assert [trial.id for trial in corpus.trials("test")] == ["3", "9-x"]
    assert corpus.trials("dev") == corpus.trials("calibration") == []
    left, right = (trial for trial in corpus.trials("train") if trial.id.startswith("7"))
    assert (left.side, right.side) == ("left", "right") and left.video == right.video and left.video.name == "7.mp4"
    assert left.group == right.group and left.subject != right.subject
    assert corpus.trials("train")[-1].side is None
    with pytest.raises(DataError, match="'training' is not a split"):
        corpus.trials("training")


def test_a_video_whose_own_name_ends_in_left(tmp_path, clip):
    root = make_corpus(tmp_path, clip, train=["turn_left"], videos=["turn_left"])
    assert Corpus(root).trials()[0].side is None and Corpus(root).trials()[0].video.name == "turn_left.mp4"


def test_groups_join_by_subject_and_by_video(tmp_path, clip):
    root = make_corpus(tmp_path, clip, train=["a", "b_left", "b_right", "c", "d"])
    (root / "subjects.csv").write_text("trial,subject\na,s1\nb_left,s1\nb_right,s2\nc,s2\nd,s3\n")
    group = {trial.id: trial.group for trial in Corpus(root).trials()}
    assert len({group[name] for name in ("a", "b_left", "b_right", "c")}) == 1 and group["d"] != group["a"]
    for content in ("who,where\n", "trial,subject\na\n", "trial,subject\na,s" + "1" * 200_000):
        (root / "subjects.csv").write_text(content)
        for trial in Corpus(root).trials():  # nobody knows who belongs together
            with pytest.raises(DataError, match="subjects.csv: not a table with the two columns"):
                read_trial(trial)


def test_carving_is_by_group_and_by_seed(tmp_path, clip):
    train = [f"{number}_{side}" for number in range(20) for side in ("left", "right")]
    root = make_corpus(tmp_path, clip, train=train, validation=["v"])
    splits = {}
    for seed in range(4):
        corpus = Corpus(root, dev_groups=4, calibration_groups=5, split_seed=seed)
        groups = {split: {trial.group for trial in corpus.trials(split)} for split in ("train", "dev", "calibration")}
        assert [len(groups[split]) for split in groups] == [11, 4, 5]
        assert all(not a & b for a, b in itertools.combinations(groups.values(), 2))
        assert [trial.id for trial in corpus.trials("validation")] == ["v"]
        splits[seed] = [trial.split for trial in corpus.trials()]
        assert splits[seed] == [trial.split for trial in Corpus(root, 4, 5, seed).trials()]
    assert len({tuple(split) for split in splits.values()}) == 4
    for dev, calibration, remedy in ((10, 10, "lower"), (25, 0, "lower"), (-1, 1, "raise"), (1, -1, "raise")):
        with pytest.raises(DataError, match=f"{remedy} dev_groups or calibration_groups"):
            Corpus(root, dev_groups=dev, calibration_groups=calibration)


def test_check_reports_what_is_odd_and_nothing_else(tmp_path, clip):
    root = make_corpus(tmp_path, clip, train=["plain", "longer", "shorter", "mute"], validation=["blank"], test=["t"],
                       videos=["plain", "longer", "shorter", "blank", "t", "spare"])
    labels = root / "annotations" / "VA_Estimation_Challenge"
    annotate(labels / "Train_Set" / "longer.txt", [[0, 0]] * 9 + [[-5, -5]] * 3)
    annotate(labels / "Train_Set" / "shorter.txt", [[0, 0]] * 9)
    annotate(labels / "Validation_Set" / "blank.txt", [[-5, 0]] * 10)
    write_video(root / "videos" / "mute.avi", [wall(size=64)] * 10, np.arange(10) / 25)
    table = Corpus(root).check()
    assert (table.problem == "").all()
    assert dict(zip(table.trial, table.oddities)) == {
        "blank": "no row is labelled", "longer": "2 rows more than pictures", "mute": "no sound", "plain": "",
        "shorter": "1 row fewer than pictures", "t": "", "": "no trial belongs to this video"}
    table = table.set_index("trial")
    assert table.loc["longer", "rows"] == 12 and table.loc["longer", "frames"] == 10 and table.loc["longer", "labelled"] == 0.75
    assert table.loc["plain", "rate"] == pytest.approx(25) and table.loc["t", "rows"] == 10


def test_video_info_of_uneven_and_late(tmp_path):
    times = np.array([0, 1, 2, 4, 5, 8, 9, 10]) / 20
    path = write_video(tmp_path / "uneven.mp4", [wall(size=64)] * 8, times, beeps([0.5], 0.9, start=0.3), sound_start=0.3)
    info = video_info(path)
    assert info.variable and info.frames == 8 and info.rate == pytest.approx(7 / 0.5)
    assert 0.2 < info.sound_start < 0.31


def test_submission_follows_the_list(tmp_path, clip):
    root = make_corpus(tmp_path, clip, train=["1"], test=["b", "a_left"], videos=["1", "a", "b"])
    predictions = {"b": np.linspace(-2, 2, 20).reshape(10, 2), "a_left": np.array([[0.5, -0.25]])}
    write_submission(tmp_path / "out" / "submission.txt", Corpus(root).test_list, predictions)
    lines = (tmp_path / "out" / "submission.txt").read_text().splitlines()
    asked = (root / "test_set_example.txt").read_text().splitlines()
    assert [line.split(",")[0] for line in lines] == [line.split(",")[0] for line in asked]
    assert lines[1] == "b/00001.jpg,-1.0000,-1.0000" and lines[11:] == [f"a_left/{i:05d}.jpg,0.5000,-0.2500" for i in range(1, 11)]
    predictions["b"][3, 0] = np.nan
    with pytest.raises(DataError, match="trial b is not finite"):
        write_submission(tmp_path / "out" / "submission.txt", root / "test_set_example.txt", predictions)


@pytest.mark.parametrize("content, fault", [
    (None, "cannot be read"), ("", "line 1: '' is not the header"), ("a/00001.jpg,0,0\n", "line 1: 'a/00001.jpg,0,0' is not the header"),
    ("image_location,valence,arousal\n\n", "no row follows"), (f"image_location,valence,arousal\na/{'1' * 5000}.jpg,0,0\n", "line 2: 'a/1111"),
    ("image_location,valence,arousal\nword\n", "line 2: 'word' is not a row"),
])
def test_lists_that_cannot_be_believed(tmp_path, content, fault):
    path = tmp_path / "list.txt"
    if content is not None:
        path.write_text(content)
    for read in (lambda: read_test_list(path), lambda: write_submission(tmp_path / "submission.txt", path, {})):
        with pytest.raises(DataError) as error:
            read()
        assert str(path) in str(error.value) and fault in str(error.value) and ";" in str(error.value)
    assert not (tmp_path / "submission.txt").exists()


def test_a_corpus_without_a_list_has_nothing_to_submit(tmp_path, clip):
    corpus = Corpus(make_corpus(tmp_path / "corpus", clip, train=["1"]))
    with pytest.raises(DataError, match="submission.txt: there is no list of what to submit"):
        write_submission(tmp_path / "submission.txt", corpus.test_list, {})


LEVELS = (60, 100, 140, 180)


def coded_wall(number):
    "A wall that tells its picture's number: four quarters, a digit of base four in each."
    return wall([LEVELS[number // 4**digit % 4] for digit in range(4)])


def coded_number(crop):
    "The number read from the corners of a face crop."
    corners = [crop[rows, columns].mean() for rows in (slice(0, 4), slice(-4, None)) for columns in (slice(0, 4), slice(-4, None))]
    return sum(int(np.abs(np.array(LEVELS) - corner).argmin()) * 4**digit for digit, corner in enumerate(corners))


@pytest.mark.parametrize("uneven", [False, True])
def test_face_label_and_sound_of_a_frame_belong_together(tmp_path, uneven):
    """The lineage dropped the rows with -5 and then took face pictures by position among the rows that were left. Here every picture
    shows its own number, every row holds it, and the sound beeps at known pictures: after unlabelled rows, after pictures
    without a face, in a clip with a late sound track, whatever is kept must agree."""
    count, faceless, unlabelled, marked = 120, {*range(30, 40), *range(77, 80)}, {*range(20, 35), 60, *range(90, 95)}, (33, 50, 75, 110)
    times = np.cumsum(np.r_[0, np.tile([1, 1, 2, 1, 3], count)[: count - 1]]) / 60 if uneven else np.arange(count) / 30
    images = [coded_wall(number) if number in faceless else draw_face(coded_wall(number)) for number in range(1, count + 1)]
    sound = beeps([times[number - 1] for number in marked], times[-1], start=0.4)
    video = write_video(tmp_path / "coded.mp4", images, times, sound, sound_start=0.4)
    annotation = annotate(tmp_path / "coded.txt", [(-5, -5) if number in unlabelled else (number / 200, -number / 200)
                                                   for number in range(1, count + 3)])
    data = read_trial(Trial("coded", "train", video, annotation, None, "s", "coded"), detect_every=1)

    numbers = data["frame"]
    assert numbers.tolist() == list(range(1, count + 3))
    assert {*numbers[~data["valid"]].tolist()} == unlabelled
    kept = data["valid"]
    assert data["va"][kept] == pytest.approx(np.stack([numbers, -numbers], 1)[kept] / 200)
    found = numbers[data["visual_ok"]].tolist()
    assert not faceless & {*found} and len(found) > 0.9 * (count - len(faceless))
    assert [coded_number(data["crops"][number - 1]) for number in found] == found
    assert data["time"][:count] == pytest.approx(times, abs=1e-3)
    for number in marked:
        after = data["sound"][round((times[number - 1] - data["sound_start"]) * 16000):]
        before = data["sound"][: round((times[number - 1] - data["sound_start"]) * 16000)]
        assert np.abs(after[80:800]).max() > 0.3 and np.abs(before[-800:-80]).max() < 0.1
    assert not data["audio_ok"][data["time"] < 0.35].any() and data["audio_ok"][(data["time"] > 0.45) & (data["time"] < times[-1] - 0.1)].all()


def test_the_check_above_would_catch_the_lineages_bug():
    "Position among kept rows is not the frame number: the coded pictures show it."
    kept = np.delete(np.arange(1, 121), np.arange(19, 34))
    by_position = [coded_number(coded_wall(position)[26:134, 26:134]) for position in range(1, len(kept) + 1)]
    assert by_position != kept.tolist()
    assert [coded_number(coded_wall(number)[26:134, 26:134]) for number in kept] == kept.tolist()


def test_a_test_trial_has_no_labels(tmp_path):
    video = write_video(tmp_path / "t.mp4", talking(12), np.arange(12) / 30)
    data = read_trial(Trial("t", "test", video, None, None, "t", "t"))
    assert len(data["frame"]) == 12 and not data["valid"].any() and data["visual_ok"].all() and not data["has_sound"]
