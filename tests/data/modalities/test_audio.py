"""Sound as a picture: the same at any rate and in any kind of file, its middle, silence behind it; damage is told."""

import io
import struct

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

from vlm_train.data.decode import SampleError
from vlm_train.data.modalities.audio import FLOOR, HIGHEST, log_mel, read_audio
from vlm_train.data.transforms import Plan

PLAN = Plan(width=8, height=8, box=(0, 0, 8, 8), resized=(8, 8), size=8)
SILENCE = np.float32(np.log(FLOOR))


def tone(hertz, rate, seconds=0.5, amplitude=0.5):
    return amplitude * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)


def file_of(samples, rate, kind="WAV", subtype=None):
    stream = io.BytesIO()
    soundfile.write(stream, samples, rate, format=kind, subtype=subtype)
    return stream.getvalue()


def picture(data, shape=(40, 30), name="wav"):
    return read_audio({name: data}, {}, PLAN, shape)


@settings(max_examples=40, deadline=None)
@given(hertz=st.floats(150, 3500), rates=st.tuples(*[st.sampled_from([8000, 11025, 16000, 22050, 44100, 48000])] * 2))
def test_a_tone_has_the_same_picture_at_any_rate(hertz, rates):
    first, second = (log_mel(tone(hertz, rate), rate, 40, 30) for rate in rates)
    loud = first > first.max() - 5
    assert np.abs(first - second)[loud].max() < 0.45  # measured 0.344 of 1,500 tones: spectra have other points
    octave = log_mel(tone(2 * hertz, 48000), 48000, 40, 30)  # the twin: another tone, at a rate that holds it
    assert np.abs(first - octave)[loud].max() > 2


def test_the_loudest_band_is_where_the_tone_is():
    edges = 700 * (10 ** (np.linspace(0, 2595 * np.log10(1 + HIGHEST / 700), 42) / 2595) - 1)
    for hertz in (300, 1000, 2500, 6000):
        band = int(log_mel(tone(hertz, 16000), 16000, 40, 30).mean(axis=1).argmax())
        assert edges[band] < hertz < edges[band + 2]


def test_louder_is_more_by_the_square_and_silence_is_the_floor():
    quiet, loud = (log_mel(tone(700, 8000, amplitude=each), 8000, 40, 30).max() for each in (0.1, 0.2))
    assert loud - quiet == pytest.approx(np.log(4), abs=1e-4)
    assert (log_mel(np.zeros(4000), 8000, 40, 30) == SILENCE).all()


@pytest.mark.parametrize(("kind", "subtype", "bar"), [("FLAC", None, 1e-3), ("OGG", "VORBIS", 0.2), ("MP3", None, 0.2)])
def test_every_kind_of_file_says_the_same(kind, subtype, bar):
    for seconds in (1.0, 9.0):
        sound = tone(440, 16000, seconds) + tone(1500, 16000, seconds, 0.2)
        plain, other = picture(file_of(sound, 16000)), picture(file_of(sound, 16000, kind, subtype))
        assert np.abs(plain - other)[plain > plain.max() - 6].max() < bar


def test_channels_are_averaged_and_the_first_member_is_read():
    sound = tone(440, 16000)
    both = picture(file_of(np.stack([sound, 0 * sound], axis=1), 16000))
    assert both.max() == pytest.approx(picture(file_of(sound / 2, 16000)).max(), abs=1e-3)
    wav, flac = file_of(sound, 16000), file_of(0 * sound, 16000, "FLAC")
    assert np.array_equal(read_audio({"flac": flac, "wav": wav}, {}, PLAN, (40, 30)), picture(wav))
    assert read_audio({"txt": b"x"}, {}, PLAN, (40, 30)) is None


def test_of_what_is_longer_the_middle_and_behind_what_is_shorter_silence():
    rate, length = 16000, round(16000 * (30 * 0.01 + 0.025))
    middle = tone(900, rate, length / rate)
    long = np.concatenate([tone(3000, rate, 1.0), middle, tone(3000, rate, 1.0)])
    assert np.array_equal(picture(file_of(long, rate)), picture(file_of(middle, rate)))
    short = picture(file_of(tone(900, rate, 0.1), rate))
    assert (short[:, 10:] == SILENCE).all() and (short[:, :9].max(axis=0) > SILENCE + 5).all()


def lying(data, offset, number):
    return data[:offset] + struct.pack("<I", number) + data[offset + 4 :]


WAV = file_of(tone(440, 8000), 8000)
CASES = {
    "empty": b"", "text": b"a dog barks", "magic alone": b"RIFF", "header alone": WAV[:44], "cut flac": None,
    "many channels": WAV[:22] + b"\xff\xff" + WAV[24:], "no channels": WAV[:22] + b"\0\0" + WAV[24:],
    "no rate": lying(WAV, 24, 0), "not finite": file_of(np.full(9, np.nan), 8000, "WAV", "FLOAT"),
    "pickle": b"\x80\x04" + WAV, "au": file_of(tone(440, 8000), 8000, "AU"),
}  # fmt: skip


@pytest.mark.parametrize("case", list(CASES))
def test_what_is_no_sound_is_told(case):
    flac = file_of(tone(440, 8000, 5.0) + 0.1 * np.random.default_rng(0).random(40000), 8000, "FLAC")
    data = flac[: len(flac) // 3] if case == "cut flac" else CASES[case]
    with pytest.raises(SampleError) as caught:
        picture(data, (40, 400))
    assert caught.value.reason == "audio_corrupt"


def test_what_is_too_large_is_told_before_it_is_decoded():
    for data in (lying(WAV, 24, 1 << 30), file_of(np.zeros((2, 1000)), 48000)):
        with pytest.raises(SampleError) as caught:
            picture(data, (40, 2000))
        assert caught.value.reason == "audio_too_large"
    claims_hours = lying(lying(WAV, 4, 2**32 - 9), 40, 2**32 - 45)
    assert picture(claims_hours).shape == (40, 30)
