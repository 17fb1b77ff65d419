"""The statistics are those of the data, and the page shows them without a request to anywhere."""

import numpy as np
from data_fixtures import encoded, members_of, pixels, write_tar

from vlm_train.cli.stats_page import lines, write_page
from vlm_train.data.stats import Distribution, statistics


def made(tmp_path):
    bad = encoded(pixels(9, 60, 30))[:-30]
    members = [
        *members_of("a", 0, image=encoded(pixels(0, 40, 20))),
        *members_of("b", 1, image=encoded(pixels(1, 20, 40), "PNG")),
        ("c.png", encoded(pixels(2, 30, 30), "PNG")),
        ("c.txt", b"<script>alert(1)</script>"),
        *members_of("d", 3, image=bad),
        *members_of("e", 0, image=encoded(pixels(0, 40, 20))),
        ("f.jpg", b"no picture"),
        ("f.txt", b"x"),
        ("g.pkl", b"x"),
    ]
    write_tar(tmp_path / "a.tar", members)
    return statistics(str(tmp_path))


def test_numbers_are_those_of_the_data(tmp_path):
    found = made(tmp_path)
    assert (found.num_samples, found.num_shards, found.num_labelled) == (5, 1, 4)
    assert found.num_distinct == 4 and found.num_distinct_captions == 4  # a and e, though their KEY.json differ
    assert found.formats == {"jpg": 4, "png": 1}
    assert found.left_out == {"image_unknown": 1} and found.ignored == {"pickle": 1}
    assert found.error_rate == 1 / 6
    assert (found.num_read, found.num_unreadable) == (5, 1)
    assert {example.reason for example in found.examples} == {"", "image_truncated"}
    by_name = {each.name: each for each in found.distributions}
    assert by_name["shorter side"].percentiles[0] == 20 and by_name["longer side"].percentiles[100] == 60
    assert by_name["width / height"].percentiles[100] == 2 and by_name["width / height"].percentiles[0] == 0.5


def test_a_histogram_loses_nothing():
    for values in (np.array([3.0]), np.array([0.0, 5.0]), np.array([0.001, 1e6, 7.0]), np.full(9, 0.2)):
        each = Distribution.of("x", "", values)
        assert sum(each.counts) == len(values) and len(each.edges) == len(each.counts) + 1


def test_the_page_shows_it_and_escapes_captions(tmp_path):
    found = made(tmp_path)
    write_page(tmp_path / "stats.html", "a <title>", found)
    page = (tmp_path / "stats.html").read_text()
    assert "<script>" not in page and "&lt;script&gt;" in page and "a &lt;title&gt;" in page
    assert "http://" not in page and "https://" not in page
    assert page.count("data:image/jpeg") == 4 and "image_truncated" in page
    assert any("5 samples" in line for line in lines(found))
