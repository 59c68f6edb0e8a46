"""From videos to features on a cluster: one worker is killed half-way, and every file has the bytes of a local run."""
import numpy as np
import psutil
import torch
from clips import annotate, beeps, talking, write_video
from clusters import bounded, cluster, pinned, said, wait_for  # noqa: F401 (fixtures)

from sage_nb.affwild2 import Corpus
from sage_nb.backbones import save_encoder
from sage_nb.encoders import AudioEncoder, VisualEncoder
from tasks import extract, heard

COUNT, RATE = 60, 25
SETS = dict(Train_Set="abcdef", Validation_Set="gh")


def files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_a_cluster_extracts_what_one_process_does_although_a_worker_is_killed(tmp_path, cluster, pinned):  # noqa: F811
    torch.manual_seed(0)
    for number, (part, name) in enumerate((part, name) for part, names in SETS.items() for name in names):
        write_video(tmp_path / "corpus" / f"{name}.mp4", talking(COUNT, x=75.0 + number), np.arange(COUNT) / RATE, beeps([0.5, 1.2 + number / 20], COUNT / RATE))
        annotate(tmp_path / "corpus" / "VA_Estimation_Challenge" / part / f"{name}.txt", [[0.1, number / 10]] * COUNT)
    (tmp_path / "corpus" / "b.mp4").write_bytes((tmp_path / "corpus" / "b.mp4").read_bytes()[:2000])  # one that is broken
    for kind, net in (("visual", VisualEncoder()), ("audio", AudioEncoder())):
        save_encoder(tmp_path / "encoders" / f"{kind}.safetensors", net)
    assert len(Corpus(tmp_path / "corpus").trials("all")) == 8

    doomed = cluster.add_worker()
    prepared = tmp_path / "cluster/prepared"
    running = pinned(heard, extract, tmp_path, "cluster", cluster.address)  # paths relative to a folder in which no worker was started
    wait_for(lambda: len(list(prepared.glob("*.safetensors"))) >= 2)
    assert psutil.pid_exists(doomed.pid) and not (tmp_path / "cluster/features/index.json").exists()
    cluster.kill(doomed)
    broken, words = running.result()
    assert broken == {"b"} and "1 of 8 trials are broken and left out" in said(words) and "Traceback" not in words
    pinned(extract, tmp_path, "alone", None).result()
    here, there = files(tmp_path / "alone"), files(tmp_path / "cluster")
    assert here.keys() == there.keys() and len(here) > 20 and [name for name in here if here[name] != there[name]] == []
    assert not any(".part" in name for name in there)
