"""fid.py: the original's command line and files, every metric end to end, ranks, streaming, mistakes."""
import json
import subprocess
import sys
import zipfile
from collections import Counter

import numpy as np
import pytest
import torch

from EDM import fid, generate
from EDM.metrics import sources
from EDM.metrics.detectors import load_detector
from EDM.metrics.metrics import frechet_distance_of_features
from shared.cli import UserError
from tests.edm.scored_images import CLASSES, pixels, write_classifier, write_images, write_network
from tests.shared.programs import environment, one_line_error, run

EVERY_METRIC = ("--metrics=fid,kid,prdc,isc,cwfid", "--kid-subset-size=10", "--kid-subsets=5", "--isc-splits=3")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a detector, a snapshot, a reference set with listed classes and images in class folders."""
    folder = tmp_path_factory.mktemp("fid")
    write_classifier(folder / "detector.pth")
    write_network(folder / "network.pkl")
    write_images(folder / "real", 50, seed=0, layout="listed")
    write_images(folder / "made", 37, seed=1, layout="classes")
    call("ref", folder, "--data=real", "--dest=real.npz", "--features")
    return folder


def call(command: str, folder, *flags: str) -> None:
    """Run a command of fid.py in this process; flags with `name=` of an existing file name it inside `folder`."""
    placed = [f"{flag.partition('=')[0]}={folder / flag.partition('=')[2]}"
              if flag.partition("=")[0] in ("--data", "--dest", "--images", "--ref", "--network", "--json") else flag
              for flag in flags]
    if not any(flag.startswith("--detector") for flag in flags):
        placed.append(f"--detector={folder / 'detector.pth'}")
    fid.main([command, *placed, "--device=cpu"])


def calc(folder, *flags: str) -> dict:
    """Run `calc` and return what it writes with --json."""
    call("calc", folder, *flags, "--json=result.json")
    return json.loads((folder / "result.json").read_text())


def values(result: dict) -> dict:
    """Return the metrics of a result, lists as their items."""
    found = {name: value for name, value in result.items() if not isinstance(value, dict)}
    by_class = found.pop("class_wise_fd_classifier_by_class", [])
    return found | {f"class {number}": value for number, value in enumerate(by_class)}


def features_of(folder, images: np.ndarray) -> torch.Tensor:
    detector = load_detector(str(folder / "detector.pth"), torch.device("cpu"))
    return detector(torch.from_numpy(images).permute(0, 3, 1, 2))[0]


class TestReference:
    def test_is_the_mean_and_the_unbiased_covariance(self, place):
        features = features_of(place, pixels(50, seed=0)).double().numpy()
        with np.load(place / "real.npz", allow_pickle=False) as arrays:
            assert arrays["mu"].dtype == arrays["sigma"].dtype == np.float64
            np.testing.assert_allclose(arrays["mu"], features.mean(0), rtol=0, atol=1e-6)
            np.testing.assert_allclose(arrays["sigma"], np.cov(features, rowvar=False), rtol=0, atol=1e-6)
            np.testing.assert_allclose(arrays["features"], features, rtol=0, atol=1e-5)
            assert arrays["labels"].tolist() == [index % CLASSES for index in range(50)]
            assert arrays["num_images"] == 50 and arrays["detector"] == "classifier WideResNet"

    @pytest.mark.parametrize("batch", [7, 49, 1000])
    def test_a_last_partial_batch_changes_nothing(self, place, tmp_path, batch):
        call("ref", place, "--data=real", f"--dest={tmp_path / 'other.npz'}", f"--batch={batch}")
        with np.load(place / "real.npz") as ours, np.load(tmp_path / "other.npz") as other:
            for name in ("mu", "sigma"):
                np.testing.assert_allclose(other[name], ours[name], rtol=0, atol=1e-6)
            assert "features" not in other

    def test_of_a_zip_and_an_npz(self, place, tmp_path):
        with zipfile.ZipFile(tmp_path / "real.zip", "w") as archive:
            for file in (place / "real").iterdir():
                archive.write(file, file.name)
        np.savez(tmp_path / "images.npz", images=pixels(50, seed=0), labels=np.arange(50) % CLASSES)
        for name in ("real.zip", "images.npz"):
            call("ref", place, f"--data={tmp_path / name}", f"--dest={tmp_path / 'out.npz'}", "--features",
                 "--overwrite")
            with np.load(place / "real.npz") as ours, np.load(tmp_path / "out.npz") as other:
                assert all(np.array_equal(ours[key], other[key]) for key in ("mu", "sigma", "features", "labels"))


class TestCalc:
    def test_prints_the_distance(self, place, capsys):
        call("calc", place, "--images=made", "--ref=real.npz", "--num=37")
        order = [index for label in range(CLASSES) for index in range(label, 37, CLASSES)]
        expected = frechet_distance_of_features(features_of(place, pixels(37, seed=1)[order]),
                                                features_of(place, pixels(50, seed=0)))
        name, value = capsys.readouterr().out.splitlines()[-1].split()
        assert name == "fd_classifier" and float(value) == pytest.approx(expected, rel=1e-5)

    def test_prints_an_inception_distance_alone_as_a_bare_number(self, capsys):
        facts = {"source": {"images": 3, "seeds": "0-2"}, "reference": {"images": None},
                 "detector": {"name": "inception", "sha256": "ab", "resize": "TF1"}}
        flags = fid.SimpleNamespace(images="out", network=None, ref="cifar10.npz", json_file=None)
        fid.report(flags, {"fid": 1.9735218}, facts)
        lines = capsys.readouterr().out.splitlines()
        assert lines[-1] == "1.97352"
        assert lines[:-1] == ["reference: cifar10.npz, an unknown number of images", "images: out, 3 images, seeds 0-2",
                              "detector: inception, SHA-256 ab, resize TF1"]

    def test_reads_a_published_reference(self, place):
        with np.load(place / "real.npz") as arrays:
            np.savez(place / "published.npz", mu=arrays["mu"], sigma=arrays["sigma"])
        ours = calc(place, "--images=made", "--ref=real.npz", "--num=30")
        theirs = calc(place, "--images=made", "--ref=published.npz", "--num=30")
        assert values(theirs) == values(ours)
        assert (ours["reference"]["images"], theirs["reference"]["images"]) == (50, None)

    def test_every_metric_and_what_it_depends_on(self, place):
        result = calc(place, "--images=made", "--ref=real.npz", "--num=37", *EVERY_METRIC)
        assert set(values(result)) == {"fd_classifier", "kid", "kid_std", "precision", "recall", "density", "coverage",
                                       "isc", "isc_std", "class_wise_fd_classifier", "class 0", "class 1", "class 2"}
        assert all(np.isfinite(value) for value in values(result).values())
        assert result["class_wise_fd_classifier"] == pytest.approx(
            np.mean(result["class_wise_fd_classifier_by_class"]))
        assert result["reference"]["images"] == 50 and result["source"]["images"] == 37
        assert result["detector"]["resize"] == "none" and len(result["detector"]["sha256"]) == 64
        assert result["settings"]["kid_subset_size"] == 10

    def test_a_folder_as_the_reference_is_its_statistics(self, place):
        flags = ("--images=made", "--num=37", *EVERY_METRIC)
        assert values(calc(place, *flags, "--ref=real")) == values(calc(place, *flags, "--ref=real.npz"))

    def test_images_of_the_reference_itself(self, place):
        result = calc(place, "--images=real", "--ref=real.npz", "--num=50", *EVERY_METRIC)
        assert result["fd_classifier"] == pytest.approx(0, abs=1e-6)
        assert result["class_wise_fd_classifier"] == pytest.approx(0, abs=1e-5)
        assert result["precision"] == result["recall"] == result["coverage"] == 1
        assert result["kid"] < 1e-3

    def test_a_collapsed_generator(self, place, tmp_path):
        one = write_images(tmp_path / "one", 1, seed=0) / "000000.png"
        for index in range(1, 40):
            (tmp_path / "one" / f"{index:06d}.png").write_bytes(one.read_bytes())
        result = calc(place, f"--images={tmp_path / 'one'}", "--ref=real.npz", "--num=40", "--metrics=prdc")
        assert result["precision"] == 1 and result["recall"] < 0.05

    def test_the_choice_of_a_part_follows_the_seed(self, place):
        """The published data set shuffles the sorted names, takes the first and sorts again."""
        order = np.arange(50)
        np.random.RandomState(5).shuffle(order)
        chosen = sources.FileImages(str(place / "real"), count=12, seed=5).chosen
        assert chosen.tolist() == sorted(order[:12].tolist())
        first, same, other = (values(calc(place, "--images=real", "--ref=real.npz", "--num=12", f"--seed={seed}"))
                              for seed in (5, 5, 6))
        assert first == same != other

    def test_gray_images_are_repeated_and_colour_ones_refused_by_a_gray_detector(self, place, tmp_path):
        gray = write_images(tmp_path / "gray", 9, seed=0, channels=1)
        write_classifier(tmp_path / "gray.pth", channels=1)
        images, _ = next(sources.FileImages(str(gray)).batches([range(9)]))
        assert images.shape == (9, 3, 8, 8) and torch.equal(images[:, 0], images[:, 2])
        call("ref", place, f"--data={gray}", f"--dest={tmp_path / 'gray.npz'}", f"--detector={tmp_path / 'gray.pth'}")
        with pytest.raises(UserError, match="img00000.png: has colour, the detector takes gray images"):
            call("ref", place, "--data=real", f"--dest={tmp_path / 'x.npz'}", f"--detector={tmp_path / 'gray.pth'}")

    def test_names_the_seeds_of_generated_files(self, place, tmp_path):
        made = write_images(tmp_path / "made", 20, seed=0)
        assert calc(place, f"--images={made}", "--ref=real.npz", "--num=20")["source"]["seeds"] == "0-19"
        (made / "000007.png").unlink()
        assert calc(place, f"--images={made}", "--ref=real.npz", "--num=19")["source"]["seeds"] == "0-19, 19 of them"
        assert calc(place, "--images=made", "--ref=real.npz", "--num=37")["source"]["seeds"] is None


class TestSnapshot:
    @pytest.mark.parametrize("classes", [("--steps=2",), ("--class=1", "--sampler=dpmpp-2m", "--steps=2"),
                                         ("--classes=all", "--S_churn=3", "--steps=2")], ids=str)
    def test_scores_what_generate_writes(self, place, tmp_path, classes):
        given = (f"--network={place / 'network.pkl'}", "--seeds=3-12", "--batch=4", *classes)
        generate.main([*given, f"--outdir={tmp_path / 'out'}", "--device=cpu"])
        count = 30 if "--classes=all" in classes else 10
        flags = ("--ref=real.npz", "--metrics=fid,kid,prdc,isc", "--kid-subset-size=5", "--kid-subsets=3")
        direct = calc(place, *given, *flags)
        written = calc(place, f"--images={tmp_path / 'out'}", "--batch=4", f"--num={count}", *flags)
        assert values(direct) == values(written)
        assert direct["source"]["images"] == count and direct["source"]["seeds"] == "3-12"
        network = direct["source"]["sampling"]["network"]
        assert len(network) == 64 and written["source"]["sampling"]["network"] == network

    def test_scores_an_archive_that_generate_writes(self, place, tmp_path):
        given = (f"--network={place / 'network.pkl'}", "--seeds=3-12", "--steps=2", "--classes=all")
        flags = ("--ref=real.npz", "--metrics=fid,cwfid")
        direct = calc(place, *given, *flags)
        for name in ("out.zip", "out.npz"):
            generate.main([*given, f"--outdir={tmp_path / name}", "--device=cpu"])
            written = calc(place, f"--images={tmp_path / name}", "--num=30", *flags)
            assert values(written) == pytest.approx(values(direct))
            assert written["source"]["seeds"] == direct["source"]["seeds"] == "3-12"
            assert written["source"]["sampling"]["network"] == direct["source"]["sampling"]["network"]

    def test_class_wise_by_the_classes_it_was_given(self, place, tmp_path):
        given = (f"--network={place / 'network.pkl'}", "--seeds=0-9", "--classes=all", "--steps=2")
        generate.main([*given, f"--outdir={tmp_path / 'out'}", "--device=cpu"])
        direct = calc(place, *given, "--ref=real.npz", "--metrics=cwfid")
        written = calc(place, f"--images={tmp_path / 'out'}", "--ref=real.npz", "--num=30", "--metrics=cwfid")
        assert values(direct) == values(written)

    def test_takes_as_many_seeds_as_num(self, place):
        result = calc(place, "--network=network.pkl", "--num=6", "--steps=2", "--ref=real.npz")
        assert result["source"]["seeds"] == "0-5" and result["source"]["sampling"]["num_steps"] == 2


class TestStreaming:
    def test_each_image_is_read_once(self, place, monkeypatch):
        read, original = Counter(), sources.read_members

        def counted(path, members):
            read.update((str(path), member.name) for member in members)
            return original(path, members)

        monkeypatch.setattr(sources, "read_members", counted)
        call("calc", place, "--images=made", "--ref=real", "--num=37", *EVERY_METRIC, "--batch=8")
        assert len(read) == 37 + 50 and set(read.values()) == {1}

    def test_memory_does_not_grow_with_the_number_of_images(self, tmp_path):
        """48 MB of pixels pass through a process whose memory grows by less than a third of that."""
        pytest.importorskip("resource")
        write_images(tmp_path / "many", 1, seed=0, size=128)
        one = (tmp_path / "many" / "000000.png").read_bytes()
        for index in range(1, 1000):
            (tmp_path / "many" / f"{index:06d}.png").write_bytes(one)
        code = f"""
import resource, torch
from EDM.metrics.detectors import Detector
from EDM.metrics.features import extract
from EDM.metrics.sources import FileImages
from shared.distributed import World
means = lambda images: (images.float().mean((2, 3)), None)
detector = Detector("means", "means", means, 3, 3, 0, "none", "none", "none", torch.device("cpu"))
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
extract(FileImages({str(tmp_path / 'many')!r}, count=64), detector, 16, World())
before = peak()
extraction = extract(FileImages({str(tmp_path / 'many')!r}), detector, 16, World())
assert extraction.moments.count == 1000 and extraction.features is None
assert peak() - before < 16, peak() - before
"""
        subprocess.run([sys.executable, "-c", code], check=True, env=environment())


class TestRanks:
    def test_two_ranks_find_what_one_does(self, place, tmp_path):
        """With features handed over in order, and 37 images in batches of 8, of which the ranks' shares differ."""
        flags = ("calc", "--images", place / "made", "--ref", place / "real.npz", "--num-images=37", "--batch=8",
                 "--detector", place / "detector.pth", *EVERY_METRIC, "--device=cpu")
        run("EDM/fid.py", *flags, "--json", tmp_path / "two.json", ranks=2)
        result = json.loads((tmp_path / "two.json").read_text())
        expected = calc(place, "--images=made", "--ref=real.npz", "--num=37", "--batch=8", *EVERY_METRIC)
        assert values(result) == pytest.approx(values(expected), rel=1e-4, abs=1e-6)

    def test_more_ranks_than_batches_from_a_snapshot_and_a_folder(self, place, tmp_path):
        flags = ("--network", place / "network.pkl", "--seeds=0-2", "--steps=2", "--ref", place / "real",
                 "--detector", place / "detector.pth", "--device=cpu")
        run("EDM/fid.py", "calc", *flags, "--json", tmp_path / "two.json", ranks=2)
        result = json.loads((tmp_path / "two.json").read_text())
        expected = calc(place, "--network=network.pkl", "--seeds=0-2", "--steps=2", "--ref=real")
        assert values(result) == pytest.approx(values(expected), rel=1e-4)


MISTAKES = {
    "few images": (["--images=made", "--ref=real.npz"], "Found 37 images, but expected at least 50000"),
    "no images": (["--images=nowhere", "--ref=real.npz"], "nowhere: no such file or folder"),
    "neither": (["--ref=real.npz"], "give either --images or --network"),
    "both": (["--images=made", "--network=network.pkl", "--ref=real.npz"], "give either --images or --network"),
    "steps of images": (["--images=made", "--ref=real.npz", "--steps=5"], "--steps belongs to --network"),
    "seed of a network": (["--network=network.pkl", "--ref=real.npz", "--seed=5"], "--seed chooses among --images"),
    "unknown metric": (["--images=made", "--ref=real.npz", "--metrics=fid,kidd"], 'unknown metric "kidd".*mean "kid"'),
    "large subsets": (["--images=made", "--ref=real.npz", "--num=37", "--metrics=kid"], "--kid-subset-size: expected"),
    "many neighbours": (["--images=made", "--ref=real.npz", "--num=37", "--metrics=prdc", "--pr-k=37"], "--pr-k: exp"),
    "no reference": (["--images=made", "--ref=nowhere.npz", "--num=37"], "nowhere.npz: no such file"),
    "no features": (["--images=made", "--ref=thin.npz", "--num=37", "--metrics=prdc"], "needs every feature of"),
    "no classes": (["--images=unlabelled", "--ref=real.npz", "--num=9", "--metrics=cwfid"], "needs the class of every"),
    "no statistics": (["--images=made", "--ref=images.npz", "--num=37"], "no arrays mu and sigma .it has images"),
    "cut short": (["--images=made", "--ref=cut.npz", "--num=37"], "cut.npz: cut short or not a ZIP"),
    "another width": (["--images=made", "--ref=wide.npz", "--num=37"], "has 2048 features .*has 64"),
    "other weights": (["--images=made", "--ref=others.npz", "--num=37"], "made with other weights"),
    "not finite": (["--images=made", "--ref=nan.npz", "--num=37"], "not finite"),
    "pickled": (["--images=made", "--ref=pickled.npz", "--num=37"], "holds more than plain arrays"),
    "damaged image": (["--images=damaged", "--ref=real.npz", "--num=9"], "damaged/000004.png: cut short or not an im"),
    "unequal sizes": (["--images=unequal", "--ref=real.npz", "--num=10"], "all images must have one size"),
}


class TestMistakes:
    @pytest.fixture(scope="class")
    @classmethod
    def bad(cls, place):
        """Beside the good files: references and folders with something wrong."""
        with np.load(place / "real.npz") as arrays:
            good = dict(arrays)
        thin = {name: good[name] for name in ("mu", "sigma")}
        np.savez(place / "thin.npz", **thin)
        np.savez(place / "images.npz", images=np.zeros((3, 8, 8, 3), np.uint8))
        np.savez(place / "wide.npz", mu=np.zeros(2048), sigma=np.eye(2048))
        np.savez(place / "others.npz", **{**good, "detector_sha256": "0" * 64})
        np.savez(place / "nan.npz", mu=good["mu"] * np.nan, sigma=good["sigma"])
        np.savez(place / "pickled.npz", **thin, extra=np.array([{}], dtype=object))
        (place / "cut.npz").write_bytes((place / "real.npz").read_bytes()[:-100])
        write_images(place / "unlabelled", 9, seed=0)
        write_images(place / "damaged", 9, seed=0)
        file = place / "damaged" / "000004.png"
        file.write_bytes(file.read_bytes()[:100])
        write_images(place / "unequal", 10, seed=0)
        write_images(place / "unequal" / "z", 1, seed=0, size=16)
        (place / "unequal" / "000009.png").unlink()
        return place

    @pytest.mark.parametrize("name", MISTAKES)
    def test_one_line(self, bad, name):
        flags, message = MISTAKES[name]
        with pytest.raises(UserError, match=message) as error:
            call("calc", bad, *flags, "--batch=4")
        assert "\n" not in str(error.value)

    def test_a_score_that_needs_classes_of_a_network_without(self, place, tmp_path):
        write_network(tmp_path / "network.pkl", label_dim=0)
        with pytest.raises(UserError, match="needs the class of every image, which .*network.pkl does not give"):
            call("calc", place, f"--network={tmp_path / 'network.pkl'}", "--num=4", "--ref=real.npz", "--metrics=cwfid")

    def test_the_exit_status_is_2_and_nothing_is_written(self, place, tmp_path):
        result = run("EDM/fid.py", "ref", "--data", tmp_path / "nowhere", "--dest", tmp_path / "out" / "x.npz",
                     "--detector", place / "detector.pth", status=2)
        assert "nowhere: no such file or folder" in one_line_error(result)
        result = run("EDM/fid.py", "calc", "--images", place / "made", "--num=1", "--ref=x", status=2)
        assert "--num" in one_line_error(result)
        assert not list(tmp_path.rglob("*.npz"))

    def test_no_detector_is_one_line_that_says_how_to_get_it(self, place, tmp_path):
        result = run("EDM/fid.py", "calc", "--images", place / "made", "--ref", place / "real.npz", status=2,
                     cwd=tmp_path, TORCH_HOME=str(tmp_path))
        assert "no inception weights here; give --download" in one_line_error(result)
