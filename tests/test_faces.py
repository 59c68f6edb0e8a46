"""Detectors behind one interface, several faces followed, the trial's own among them."""
import io
import struct
from dataclasses import replace

import cv2
import numpy as np
import pytest
from clips import annotate, beeps, draw_face, wall, write_video
from PIL import Image

from sage_nb.affwild2 import Corpus, Crops, Trial
from sage_nb.backbones import save_encoder
from sage_nb.core import DataError, read_arrays, read_json
from sage_nb.corruption import FAMILIES
from sage_nb.encoders import AudioEncoder, VisualEncoder
from sage_nb.features import encode_corpus, prepare_corpus
from sage_nb.media import Cascade, FaceFinder, YuNet, face_finder, read_crops, read_trial
from sage_nb.suite import encode_corrupted


# --- a model file of YuNet's form, written by hand: it takes bright spots of 8 pixels for faces 48 pixels wide

def field(number, value):
    "One field of a protocol buffer: an integer, or bytes."
    def varint(value):
        out = b""
        while value > 127:
            out, value = out + bytes([value & 127 | 128]), value >> 7
        return out + bytes([value])

    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    value = value.encode() if isinstance(value, str) else value
    return varint(number << 3 | 2) + varint(len(value)) + value


def node(kind, inputs, output, **lists):
    attributes = b"".join(field(5, field(1, name) + b"".join(field(8, value) for value in values) + field(20, 7)) for name, values in lists.items())
    return field(1, b"".join(field(1, name) for name in inputs) + field(2, output) + field(4, kind) + attributes)


def tensor(name, values):
    values = np.asarray(values)
    kind, kept = (7, values.astype("<i8")) if values.dtype.kind == "i" else (1, values.astype("<f4"))
    return field(5, b"".join(field(1, size) for size in values.shape) + field(2, kind) + field(8, name) + field(9, kept.tobytes()))


def shaped(name, sizes):
    return field(1, name) + field(2, field(1, field(1, 1) + field(2, b"".join(field(1, field(1, size)) for size in sizes))))


def spots(path, channels=3, colours=(1, 1, 1)):
    "Write the model; `colours`: what it makes of blue, green and red."
    graph = b""
    for stride in (8, 16, 32):
        graph += node("AveragePool", ["input"], f"mean_{stride}", kernel_shape=[stride] * 2, strides=[stride] * 2)
        sees = stride == 8
        for name, weight, bias in (("cls", [[0.01 * sees * colour / sum(colours) for colour in colours]], [-1.5 if sees else -9]), ("obj", np.zeros((1, 3)), [1]),
                                   ("bbox", np.zeros((4, 3)), [0.5, 0.5, np.log(48 / 8), np.log(48 / 8)]), ("kps", np.zeros((10, 3)), np.zeros(10))):
            out = f"{name}_{stride}"
            graph += tensor(f"w_{out}", np.reshape(weight, (-1, channels, 1, 1)).astype(float)) + tensor(f"b_{out}", np.array(bias, float))
            graph += tensor(f"s_{out}", np.array([1, -1, len(bias)]))
            graph += node("Conv", [f"mean_{stride}", f"w_{out}", f"b_{out}"], f"c_{out}", kernel_shape=[1, 1])
            graph += node("Transpose", [f"c_{out}"], f"t_{out}", perm=[0, 2, 3, 1]) + node("Reshape", [f"t_{out}", f"s_{out}"], out)
            graph += field(12, shaped(out, [1, (320 // stride) ** 2, len(bias)]))
    graph += field(2, "spots") + field(11, shaped("input", [1, 3, 320, 320]))
    path.write_bytes(field(1, 7) + field(8, field(2, 11)) + field(7, graph))
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return spots(tmp_path_factory.mktemp("model") / "spots.onnx")


def person(image, x, y=80, light=255):
    "A face (which the cascade knows as well) with a bright spot of 8 pixels in its middle."
    draw_face(image, x, y, radius=20)
    column, row = round(x) // 8 * 8, round(y) // 8 * 8
    image[row : row + 8, column : column + 8] = light
    return image


def scene(*people):
    image = np.concatenate([wall(), wall()], 1)
    for x in people:
        person(image, x)
    return image


def test_yunet_gives_boxes_and_scores(model):
    image = person(person(np.concatenate([wall(), wall()], 1), 84), 244, 44, light=230)
    boxes, scores = YuNet(model)(image)
    order = boxes[:, 0].argsort()
    assert boxes[order] == pytest.approx(np.array([[60, 60, 48, 48], [220, 20, 48, 48]]), abs=0.01)
    assert scores[order] == pytest.approx(np.sqrt([1.0, 0.8]), abs=0.01)
    assert len(YuNet(model, sure=0.95)(image)[0]) == 1 and len(YuNet(model)(image, least=50)[0]) == len(YuNet(model)(image, most=40)[0]) == 0
    boxes, scores = YuNet(model)(wall())
    assert boxes.shape == (0, 4) and scores.shape == (0,)


def test_yunet_sees_large_pictures_smaller(model):
    image = person(np.concatenate([wall(), wall()], 1), 84).repeat(4, 0).repeat(4, 1)  # 640 x 1280, seen at half of that
    [box], _ = YuNet(model)(image)
    assert box[2:].tolist() == [96, 96] and np.abs(box[:2] + 48 - 4 * 84).max() < 20


@pytest.mark.parametrize("content", [None, b"", b"words", "half", "other"])
def test_a_model_that_is_none(tmp_path, model, content):
    path = tmp_path / "model.onnx"
    if content == "half":
        path.write_bytes(model.read_bytes()[:700])
    elif content == "other":
        path.write_bytes(field(1, 7) + field(8, field(2, 11)) + field(7, node("Relu", ["input"], "out") + field(2, "x") + field(11, shaped("input", [1, 3, 320, 320]))
                                                                     + field(12, shaped("out", [1, 3, 320, 320]))))
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError) as error:
        YuNet(path)(wall())
    assert str(path) in str(error.value) and "face_detection_yunet_2023mar.onnx" in str(error.value) and "\n" not in str(error.value)


def test_every_frame_has_a_verdict_a_score_and_a_box(model, tmp_path):
    images = [scene(84) if number < 20 else scene() for number in range(30)]
    video = write_video(tmp_path / "t.mp4", images, np.arange(30) / 25)
    data = read_trial(Trial("t", "train", video, None, None, "s", "t"), face_model=model)
    assert data["visual_ok"].tolist() == [True] * 20 + [False] * 10
    assert (data["score"][:20] > 0.6).all() and data["score"][::5][:4] == pytest.approx(1, abs=0.05) and not data["score"][20:].any()
    assert np.abs(data["box"][:20] - [60, 60, 48, 48]).max() < 3 and not data["box"][20:].any()


def test_the_model_reaches_a_corpus(model, tmp_path):
    root = tmp_path / "corpus"
    write_video(root / "t.mp4", [scene(84)] * 3, np.arange(3) / 25)
    (root / "VA_Estimation_Challenge" / "Train_Set").mkdir(parents=True)
    (root / "VA_Estimation_Challenge" / "Train_Set" / "t.txt").write_text("valence,arousal\n0,0\n")
    prepare_corpus(Corpus(root), tmp_path / "out", workers=1, face_model=str(model))
    assert read_arrays(tmp_path / "out" / "t.safetensors")[0]["box"][0, 2] == 48


def middles(faces):
    return np.array([face.box[0] + face.box[2] / 2 for face in faces])


@pytest.fixture(params=["cascade", "yunet"])
def finder(request, model):
    "A finder that follows several faces."
    detector = YuNet(model) if request.param == "yunet" else Cascade()
    return lambda **about: FaceFinder(detector=detector, several=True, **about)


def test_the_face_among_several_is_followed_across_the_picture(finder):
    find = finder()
    x = np.linspace(60, 170, 80)
    faces = [find(scene(at, *[230] * (number > 0))) for number, at in enumerate(x)]
    assert all(face.found for face in faces) and np.abs(middles(faces) - x).max() < 9


@pytest.mark.parametrize("side, x", [("left", 84), ("right", 244)])
def test_who_was_seen_beside_the_person_is_somebody_else(finder, side, x):
    other = 328 - x
    find = finder(side=side)
    faces = [find(scene(*([x, other] if number < 10 or number >= 90 else [other]))) for number in range(100)]
    assert all(face.found for face in faces[:10]) and not any(face.found for face in faces[12:90]) and all(face.found for face in faces[95:])
    assert np.abs(middles(faces[:10] + faces[95:]) - x).max() < 9


def test_the_side_is_a_place_among_all_who_are_known(finder):
    "Both on the left half of the picture: the right one is not lost when the left one hides."
    find = finder(side="right")
    faces = [find(scene(*([36, 140] if number % 20 < 10 else [140]))) for number in range(40)]
    assert np.abs(middles([face for face in faces if face.found]) - 140).max() < 9 and np.mean([face.found for face in faces]) > 0.9


def test_a_place_is_known_without_a_detection():
    "The right one comes back to the left half of the picture while the detector overlooks the left one."
    seen, overlooked = Cascade(), False

    def detector(image, *sizes):
        boxes, scores = seen(image, *sizes)
        kept = boxes[:, 0] > 90 if overlooked else scores > 0
        return boxes[kept], scores[kept]

    find, faces = FaceFinder(side="right", detector=detector, several=True), []
    for number in range(60):
        overlooked = number >= 45
        faces.append(find(scene(*([36, 230] if number < 10 else [36] if number < 45 else [36, 140]))))
    assert not any(face.found for face in faces[11:45]) and all(face.found for face in faces[51:]) and np.abs(middles(faces[51:]) - 140).max() < 9


def test_after_ten_seconds_a_bystander_may_be_the_one(finder):
    find = finder()
    faces = [find(scene(*([84] * (number < 10) + [244] * (number > 0)))) for number in range(330)]
    assert middles(faces)[0] < 160 and not any(face.found for face in faces[12:300]) and faces[-1].found and abs(middles(faces)[-1] - 244) < 9


def test_one_face_needs_no_others(model):
    "Following several changes nothing for a single one."
    images = [scene(84 + 20 * np.sin(number / 9)) for number in range(40)]
    one, several = (FaceFinder(detector=YuNet(model), several=several) for several in (False, True))
    assert [one(image) for image in images] == [several(image) for image in images]


def test_given_pictures_come_before_any_detector(model, tmp_path):
    from corpora import archive, jpg

    root = tmp_path / "corpus"
    write_video(root / "t.mp4", [scene(84)] * 3, np.arange(3) / 25)
    (root / "VA_Estimation_Challenge" / "Train_Set").mkdir(parents=True)
    (root / "VA_Estimation_Challenge" / "Train_Set" / "t.txt").write_text("valence,arousal\n0,0\n")
    archive([(b"t/00002.jpg", jpg(77))], root / "cropped_aligned.zip")
    [trial] = Corpus(root).trials()
    assert read_trial(trial, face_model=model)["visual_ok"].tolist() == [False, True, False]
    assert read_trial(replace(trial, crops=None), face_model=model)["visual_ok"].tolist() == [True] * 3


def test_yunet_is_given_blue_first(tmp_path):
    blue = YuNet(spots(tmp_path / "blue.onnx", colours=(1, 0, 0)))
    for light, found in (((0, 0, 255), 1), ((255, 0, 0), 0)):
        image = wall((20,) * 4)
        image[80:88, 80:88] = light
        assert len(blue(image)[0]) == found


# --- the side decides again

@pytest.mark.parametrize("several", [False, True])
def test_two_trials_of_a_video_do_not_end_with_one_person(several):
    "Both on the left half; the right one is there first, and is taken for the left one until the left one is seen."
    images = [scene(140)] * 10 + [scene(40, 140)] * 40
    for side, x in (("left", 40), ("right", 140)):
        find = FaceFinder(side=side, several=several)
        faces = [find(image) for image in images]
        assert all(face.found for face in faces[30:]) and np.abs(middles(faces[30:]) - x).max() < 9


def test_one_wrong_detection_moves_nobody():
    "A false alarm on the left, twice in a row and again and again, is not enough, while there are others on the right."
    seen, calls = Cascade(), 0

    def detector(image, *sizes):
        nonlocal calls
        calls += 1
        boxes, scores = seen(image, *sizes)
        return np.r_[boxes, [[10 if calls % 4 in (2, 3) else 270, 60, 40, 40]]], np.r_[scores, 1]

    find = FaceFinder(detect_every=1, side="left", detector=detector)
    faces = [find(scene(140)) for _ in range(40)]
    assert all(face.found for face in faces) and np.abs(middles(faces) - 140).max() < 9


# --- how faces are searched can be said, and is said to the suite as well

def test_a_small_face_is_found_on_demand(tmp_path):
    image = draw_face(np.concatenate([wall(size=480)] * 2, 1), 300, 240, radius=24)  # to the cascade 0.12 of the shorter side
    video = write_video(tmp_path / "t.mp4", [image] * 6, np.arange(6) / 25)
    trial = Trial("t", "train", video, None, None, "s", "t")
    assert not read_trial(trial)["visual_ok"].any()
    data = read_trial(trial, smallest_face=0.1)
    assert data["visual_ok"].all() and np.abs(data["box"][:, 0] + data["box"][:, 2] / 2 - 300).max() < 10
    assert data["box"][:, 2] == pytest.approx(0.12 * 480, rel=0.15)
    with pytest.raises(DataError, match="smallest_face is 0, but must be in"):
        read_trial(trial, smallest_face=0)


@pytest.mark.parametrize("model_given", [False, True])
@pytest.mark.parametrize("several", [None, False, True])
def test_several_faces_on_demand(model, model_given, several):
    "Who was seen beside the person does not take over if several are followed; by default they are with a YuNet."
    find = face_finder(face_model=model if model_given else None, several_faces=several)
    faces = [find(scene(*([84] if number == 0 else [84, 244] if number < 20 else [244]))) for number in range(70)]
    assert faces[-1].found == (not (model_given if several is None else several))


def test_the_search_reaches_a_corpus_and_its_suite(model, tmp_path):
    root, count = tmp_path / "corpus", 150
    x = 84 + 20 * np.sin(np.arange(count) / 9)
    for name in "tu":
        write_video(root / f"{name}.mp4", [scene(at) for at in x], np.arange(count) / 25, beeps([1], 6))
        annotate(root / "VA_Estimation_Challenge" / "Validation_Set" / f"{name}.txt", [[0.1, 0.2]] * count)
    (root / "VA_Estimation_Challenge" / "Train_Set").mkdir()
    for kind, net in (("visual", VisualEncoder()), ("audio", AudioEncoder())):
        save_encoder(tmp_path / "encoders" / f"{kind}.safetensors", net)
    corpus, search = Corpus(root), dict(detect_every=3, face_model=str(model), several_faces=False, smallest_face=0.15)
    prepare_corpus(corpus, tmp_path / "prepared", workers=1, **search)
    encode_corpus(tmp_path / "prepared", tmp_path / "encoders", tmp_path / "store", workers=1)
    places = corpus, tmp_path / "prepared", tmp_path / "encoders", tmp_path / "store", tmp_path / "suite"
    encode_corrupted(*places, workers=1, **search)
    assert read_json(tmp_path / "suite" / "suite.json")["faces"] == search
    with pytest.raises(DataError, match="search for faces"):
        encode_corrupted(*places, workers=1, **search | {"detect_every": 5})
    clean, _ = read_arrays(tmp_path / "store" / "t.safetensors")
    for family in (name for name, about in FAMILIES.items() if about.level == "media" and about.modality == "visual"):
        worse, _ = read_arrays(tmp_path / "suite" / f"{family}-3" / "t.safetensors")
        changed, inside = (worse["visual"] != clean["visual"]).any(1), worse["corrupted"]
        assert not changed[: inside.argmax()].any(), "before anything has happened the search is the same"
        assert (changed | ~worse["visual_ok"])[inside].mean() > 0.9
        assert changed[~inside].mean() < 0.6, "what the tracker remembers of a stretch fades"


# --- given face pictures as they come

def saved(image, **how):
    content = io.BytesIO()
    Image.fromarray(image).save(content, "JPEG", **how)
    return content.getvalue()


def given(folder, content):
    (folder / "00001.jpg").write_bytes(content)
    [frame] = read_crops(Crops(folder, np.array([1])))
    return frame.image


PICTURE = cv2.GaussianBlur(draw_face(wall(), x=70)[20:131, 25:136], (0, 0), 1)


@pytest.mark.parametrize("how", [dict(), dict(subsampling=0), dict(subsampling=1), dict(progressive=True), dict(restart_marker_blocks=3), dict(optimize=True)])
def test_given_pictures_look_as_libjpeg_has_them(tmp_path, how):
    content = saved(PICTURE, **how)
    expected = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR)[..., ::-1].astype(int)
    away = np.abs(given(tmp_path, content) - expected)
    assert away.max() <= 4 and away.mean() < 0.3
    grey = np.asarray(Image.fromarray(PICTURE).convert("L"))
    assert np.abs(given(tmp_path, saved(grey, **how)) - grey[..., None].astype(int)).mean() < 5


def test_a_note_to_turn_it_does_not_turn_a_face(tmp_path):
    note = Image.Exif()
    note[274] = 6
    assert (given(tmp_path, saved(PICTURE, exif=note)) == given(tmp_path, saved(PICTURE))).all()


@pytest.mark.parametrize("odd", ["newline", "bytes", "zeros", "fill"])
def test_what_surrounds_a_picture_does_not_matter(tmp_path, odd):
    good = saved(PICTURE)
    content = {"newline": good + b"\n", "bytes": good + b"junk" * 9, "zeros": good + b"\0" * 99, "fill": good[:2] + b"\xff\xff" + good[2:]}[odd]
    assert (given(tmp_path, content) == given(tmp_path, good)).all()


def test_damaged_pictures_are_refused_in_silence(tmp_path, capfd):
    "Of pictures that a wrong bit spoils at least a third; and all that are cut."
    rng = np.random.default_rng(0)
    picture = rng.integers(0, 255, (16, 16, 3)).astype(np.uint8).repeat(7, 0).repeat(7, 1)
    good, refused, wrong = saved(picture, quality=90), 0, 0
    expected = given(tmp_path, good).astype(int)
    for _ in range(150):
        content = bytearray(good)
        content[rng.integers(len(good))] ^= 1 << rng.integers(8)
        try:
            image = given(tmp_path, content)
            wrong += image.shape != expected.shape or np.abs(image - expected).mean() > 5
        except DataError as error:
            assert "00001.jpg is no complete jpg picture" in str(error)
            refused += 1
    assert refused > 0.3 * (refused + wrong) > 10
    for cut in (1, 2, 20, 300, len(good) // 2, len(good) - 3):
        with pytest.raises(DataError, match="no complete jpg"):
            given(tmp_path, good[:-cut])
    told = capfd.readouterr()
    assert told.out == told.err == ""
