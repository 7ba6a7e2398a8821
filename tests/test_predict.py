"""Predictions of a finished run."""

import csv
import io
import math

import pytest
import torch

from conftest import picture, write_class
from equiframe.data.batches import normalise
from equiframe.data.images import decode_image, fit_square, to_tensor
from equiframe.errors import InputError
from equiframe.model import load_classifier
from equiframe.predict import as_csv, find_images, predict


@pytest.fixture
def images(tmp_path):
    write_class(tmp_path / "new", 0, 2, start=900)
    write_class(tmp_path / "new" / "below", 3, 1, start=900, size=(30, 20))
    return tmp_path / "new"


def test_find_images_in_the_given_order(images, tmp_path):
    (tmp_path / "empty").mkdir()
    one = images / "below" / "900.png"
    assert find_images([one, str(images)]) == [one, images / "900.png", images / "901.png", one]
    for path, message in (("empty", "no images in .*known endings: .jpg"), ("none", "no such image or folder: .*none")):
        with pytest.raises(InputError, match=message):
            find_images([tmp_path / path])


def test_probabilities_are_those_of_the_fitted_temperature(finished_run, images):
    model, card = load_classifier(finished_run)
    found = find_images([images])
    ranked = list(predict(model, card, found, top=4, device="cpu", batch_size=2))
    assert len(ranked) == 3
    for path, row in zip(found, ranked, strict=True):
        pixels = to_tensor(fit_square(decode_image(path), 12))[None]
        batch = normalise(pixels, torch.tensor(card.mean), torch.tensor(card.std), torch.contiguous_format)
        with torch.no_grad():
            p = (model(batch).logits[0].double() / card.temperature).softmax(0)
        assert dict(row) == pytest.approx(dict(zip(card.class_names, p.tolist(), strict=True)), abs=1e-5)
        assert sum(q for _, q in row) == pytest.approx(1, abs=1e-5)


def test_the_classes_are_recognised(finished_run, tmp_path):
    model, card = load_classifier(finished_run)
    for k in range(4):
        write_class(tmp_path / str(k), k, 10, start=700)
    right = 0
    for k in range(4):
        ranked = predict(model, card, find_images([tmp_path / str(k)]), top=1, device="cpu")
        right += sum(row[0][0] == card.class_names[k] for row in ranked)
    assert right >= 32


def test_top_is_capped_and_ordered(finished_run, images):
    model, card = load_classifier(finished_run)
    for top, length in ((1, 1), (3, 3), (99, 4)):
        for row in predict(model, card, find_images([images]), top=top, device="cpu"):
            assert len(row) == length
            values = [p for _, p in row]
            assert values == sorted(values, reverse=True)
            assert sum(values) <= 1 + 1e-6


def test_any_kind_of_image(finished_run, tmp_path):
    model, card = load_classifier(finished_run)
    for i, mode in enumerate(("L", "P", "RGBA", "CMYK", "1")):
        picture(2, 5, (40, 17)).convert(mode).save(tmp_path / f"{i}.tif")
    assert len(list(predict(model, card, find_images([tmp_path]), device="cpu"))) == 5


def test_csv():
    ranked = [[("a, b", 0.75), ('say "c"', 0.25)], [("ä", 1.0), ("d", 0.0)]]
    text = as_csv(["x/1.png", "x/2,3.png"], ranked)
    rows = list(csv.reader(io.StringIO(text)))
    assert rows[0] == ["image", "class", "probability", "class_2", "probability_2"]
    assert rows[1] == ["x/1.png", "a, b", "0.750000", 'say "c"', "0.250000"]
    assert rows[2] == ["x/2,3.png", "ä", "1.000000", "d", "0.000000"]
    assert "\r" not in text


def test_a_damaged_image_is_named(finished_run, images):
    model, card = load_classifier(finished_run)
    (images / "bad.png").write_bytes((images / "900.png").read_bytes()[:70])
    with pytest.raises(InputError, match=r"damaged.*bad\.png"):
        list(predict(model, card, find_images([images]), device="cpu"))


def test_raw_cosines_are_never_called_probabilities(tiny, tmp_path):
    """Unit features on a frame of 10 unit vectors: the softmax of their cosines cannot exceed 0.253."""
    from equiframe.train import train

    metrics = train(tiny(method="etf-dr", logit_scale=1.0, epochs=5, mixup=0.0), tmp_path / "run")
    _, card = load_classifier(tmp_path / "run")
    bound = math.exp(1) / (math.exp(1) + 9 * math.exp(-1 / 9))
    assert card.temperature < 0.5
    assert metrics["nll"] < -math.log(bound)
