"""Small video files for the tests, drawn and written here so that no test depends on how the sample corpus looks."""
from fractions import Fraction
from pathlib import Path

import av
import cv2
import numpy as np

SOUND_RATE = 44100


def wall(levels=(110, 110, 110, 110), size=160) -> np.ndarray:
    "A grey picture whose four quarters have these levels, row by row."
    quarters = np.array(levels, np.uint8).reshape(2, 2)
    return quarters.repeat(size // 2, 0).repeat(size // 2, 1)[..., None].repeat(3, 2)


def draw_face(image: np.ndarray, x=80.0, y=80.0, mouth=0.3, radius=45) -> np.ndarray:
    "Draw a face that the frontal cascade knows into the picture."
    def at(u, v):
        return round((x + u * radius) * 16), round((y + v * radius) * 16)

    def ellipse(u, v, a, b, colour, start=0, end=360):
        extent = round(a * radius * 16), round(b * radius * 16)
        cv2.ellipse(image, at(u, v), extent, 0, start, end, colour, -1, cv2.LINE_AA, 4)

    ellipse(0, 0, 0.8, 1.05, (214, 176, 150))
    ellipse(0, -0.75, 0.8, 0.45, (60, 40, 30), 180, 360)
    for side in (-1, 1):
        ellipse(side * 0.34, -0.2, 0.24, 0.16, (120, 85, 70))
        ellipse(side * 0.34, -0.2, 0.15, 0.08, (245, 245, 245))
        ellipse(side * 0.34, -0.2, 0.07, 0.08, (30, 20, 20))
        cv2.line(image, at(side * 0.12, -0.42), at(side * 0.55, -0.44), (50, 35, 30), 4, cv2.LINE_AA, 4)
    cv2.line(image, at(-0.1, 0.26), at(0.1, 0.26), (120, 80, 70), 3, cv2.LINE_AA, 4)
    ellipse(0, 0.55, 0.3, 0.06 + 0.2 * mouth, (130, 50, 50))
    return image


def beeps(moments, seconds, start=0.0, length=0.06, rate=SOUND_RATE) -> np.ndarray:
    "Sound that begins at `start` on the clock of `moments`, with a 1 kHz beep at each of them."
    time = start + np.arange(round((seconds - start) * rate)) / rate
    on = np.any([(time >= moment) & (time < moment + length) for moment in moments], axis=0)
    return 0.5 * np.sin(2 * np.pi * 1000 * time) * on


def write_video(path, images, times, sound=None, sound_start=0.0, codec=None, pauses=(), options=None,
                rate=SOUND_RATE, layout="mono", more=(), turned=0, x264="") -> Path:
    """Write an mp4 (H.264, AAC; any times) or avi (MPEG-4, PCM; even times only) file.
    `pauses`: pairs (sample, seconds); from this sample on, the sound is stamped so much later. `sound`: [N], or [channels, N] as `layout` says.
    `more`: further sound tracks, of the same kind; `turned`: degrees by which a player is to turn the picture;
    `x264`: parameters of the H.264 encoder."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    mp4 = path.suffix == ".mp4"
    picture_rate = Fraction(1 / float(np.median(np.diff(times)))).limit_denominator(1001)
    tick = Fraction(1, 90000) if mp4 else 1 / picture_rate
    with av.open(str(path), "w", options=options or {}) as container:
        height, width = images[0].shape[:2]
        video = container.add_stream(codec or ("libx264" if mp4 else "mpeg4"), rate=picture_rate, height=height, width=width,
                                     pix_fmt="yuv420p", options={"crf": "12", **({"x264-params": x264} if x264 else {})})
        video.codec_context.time_base = tick
        if turned:
            video.set_display_rotation(turned)
        sounds = [np.atleast_2d(values) for values in (sound, *more) if values is not None]
        tracks = [container.add_stream("aac" if mp4 else "pcm_s16le", rate=rate, layout=layout) for _ in sounds]
        for image, time in zip(images, times):
            picture = av.VideoFrame.from_ndarray(image)
            picture.pts, picture.time_base = round(time / tick), tick
            container.mux(video.encode(picture))
        container.mux(video.encode())
        for track, channels in zip(tracks, sounds):
            for position in range(0, channels.shape[1], 1024):
                values = np.ascontiguousarray(channels[:, position : position + 1024])
                values = values.astype(np.float32) if mp4 else (values.T.reshape(1, -1) * 32767).astype(np.int16)
                chunk = av.AudioFrame.from_ndarray(values, format="fltp" if mp4 else "s16", layout=layout)
                late = sound_start + sum(seconds for sample, seconds in pauses if position >= sample)
                chunk.sample_rate, chunk.pts, chunk.time_base = rate, position + round(late * rate), Fraction(1, rate)
                container.mux(track.encode(chunk))
            container.mux(track.encode())
    return path


def talking(count, **face) -> list[np.ndarray]:
    "Pictures of a face whose mouth moves."
    return [draw_face(wall(), mouth=0.5 + 0.5 * np.sin(number / 3), **face) for number in range(count)]


def annotate(path, va) -> Path:
    "Write an annotation file from rows of valence and arousal."
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("valence,arousal\n" + "".join(f"{valence:g},{arousal:g}\n" for valence, arousal in va))
    return path
