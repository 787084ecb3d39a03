"""Train the example model of music: an LSTM that goes on with the melody of a chorale, note by note.

Data: soprano lines of Bach's chorales in the edition that `music21` carries, from `chorales.json`, which `chorales.py`
makes. A fifth of the families of tunes is held out: no setting of a tune held out is trained on. Model: each note is
embedded by its pitch, its length and its place in the bar, and an LSTM gives the probabilities of what comes next. A
second signature, `generate`, draws one note after the other. Writes `1/` (a SavedModel with both signatures),
`labels.txt` and `example.json` next to this script.
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # read once, when TensorFlow is first imported

import numpy as np
from numpy.typing import NDArray

SEED = 7
METRIC = "perplexity"
GOAL = 11.5
"""Below what the bigram model reaches, which `main` makes sure of."""
LOWER_IS_BETTER = True

FOLDER = Path(__file__).resolve().parent
HELD_OUT_SHARE = 0.2
LOWEST, HIGHEST, REST = 57, 81, 0
DURATIONS = (1, 2, 3, 4, 6, 8, 12, 16, 24)
PITCHES = (REST, *range(LOWEST, HIGHEST + 1))
CLASSES = 1 + len(PITCHES) * len(DURATIONS)
"""Class 0 is the melody's end; class 1 + pitch · 9 + duration counts both by their place in the tuples above."""
PLACES_OF_CLASS = np.array(
    [(0, 0), *((1 + pitch, 1 + length) for pitch in range(len(PITCHES)) for length in range(len(DURATIONS)))], np.int32
)
LENGTH_OF_CLASS = np.array([0, *(DURATIONS * len(PITCHES))], np.int32)
BAR = 16
WIDTHS = {"pitch": 24, "duration": 8, "place": 8}
WEIGHT_DECAY = 0.1
UNITS = 96
DROPOUT = 0.4
EPOCHS = 60
BATCH_ROWS = 16
LEARNING_RATE = 4e-3
MIN_TEMPERATURE = 1e-3

EXAMPLE_NOTES = 8
CLIPPED_PITCHES = (REST, *(min(max(pitch, LOWEST), HIGHEST) for pitch in range(1, 128)))
"""What is played for each MIDI number: those out of range become the nearest."""
Ints = NDArray[np.int32]
Floats = NDArray[np.float32]
Classes = list[int]


class Data(NamedTuple):
    """Melodies as classes, each with the end (0) as its last."""

    train: list[Classes]
    held_out: list[Classes]


def class_of(pitch: int, duration: int) -> int:
    """Return the class of a note: a MIDI number or `REST`, and a length in sixteenths."""
    return 1 + PITCHES.index(pitch) * len(DURATIONS) + DURATIONS.index(duration)


def note_of(number: int) -> tuple[int, int]:
    """Return pitch and duration of a class; (0, 0) of the end."""
    if number == 0:
        return 0, 0
    pitch, duration = divmod(number - 1, len(DURATIONS))
    return PITCHES[pitch], DURATIONS[duration]


def label_of(number: int) -> str:
    """Return the name of a class: `C5 4`, `rest 8` or `end`, with lengths in sixteenths."""
    pitch, duration = note_of(number)
    if number == 0:
        return "end"
    if pitch == REST:
        return f"rest {duration}"
    return (
        f"{('C', 'C#', 'D', 'Eb', 'E', 'F', 'F#', 'G', 'G#', 'A', 'Bb', 'B')[pitch % 12]}{pitch // 12 - 1} {duration}"
    )


def load_data() -> Data:
    """Return both parts; of each family held out there is one melody only, the first."""
    melodies = json.loads((FOLDER / "chorales.json").read_text(encoding="utf-8"))
    families = np.random.default_rng(SEED).permutation(sorted({melody["family"] for melody in melodies}))
    to_take = set(families[: round(HELD_OUT_SHARE * len(families))].tolist())
    ours = set(families.tolist()) - to_take
    data = Data([], [])
    for melody in melodies:
        classes = [*(class_of(*note) for note in melody["notes"]), 0]
        if melody["family"] in ours:
            data.train.append(classes)
        elif melody["family"] in to_take:
            to_take.remove(melody["family"])
            data.held_out.append(classes)
    return data


def bigram_perplexity() -> float:
    """Return the perplexity on the melodies held out of a bigram model with Witten-Bell smoothing.

    Each order is mixed with the one below by the number of different successors that it has seen; below the unigrams
    is the even distribution (Witten and Bell 1991, method C).
    """
    data = load_data()
    pairs = np.zeros((CLASSES, CLASSES))
    for melody in data.train:
        np.add.at(pairs, ([0, *melody[:-1]], melody), 1)

    def mixed(counts: NDArray[np.float64], below: NDArray[np.float64]) -> NDArray[np.float64]:
        kinds = np.maximum(np.count_nonzero(counts, axis=-1, keepdims=True), 1)
        shares: NDArray[np.float64] = (counts + kinds * below) / (counts.sum(axis=-1, keepdims=True) + kinds)
        return shares

    of_note = mixed(pairs, mixed(pairs.sum(axis=0), np.full(CLASSES, 1 / CLASSES)))
    logs = [np.log(of_note[[0, *melody[:-1]], melody]) for melody in data.held_out]
    return float(np.exp(-np.concatenate(logs).mean()))


def columns_of(melodies: list[Classes]) -> tuple[Ints, Ints]:
    """Return pitches and durations, each (melodies, longest), with zeros before the first note."""
    longest = max(map(len, melodies))
    notes = np.zeros((len(melodies), longest, 2), np.int32)
    for row, melody in enumerate(melodies):
        if melody:
            notes[row, longest - len(melody) :] = [note_of(number) for number in melody]
    return notes[..., 0], notes[..., 1]


def held_out() -> tuple[dict[str, Ints], Ints]:
    """Return `pitch` and `duration` (rows, notes), a row for each note and end held out, and its class (rows,)."""
    melodies = load_data().held_out
    pitch, duration = columns_of([melody[:at] for melody in melodies for at in range(len(melody))])
    return {"pitch": pitch, "duration": duration}, np.concatenate(melodies).astype(np.int32)


def score(outputs: dict[str, Floats], truth: Ints) -> float:
    """Return the perplexity: e to the mean negative log probability that `next_note` (rows, 235) gives the truth."""
    probabilities = np.asarray(outputs["next_note"], np.float64)[np.arange(len(truth)), truth]
    return float(np.exp(-np.log(np.maximum(probabilities, 1e-12)).mean()))


def build() -> Any:
    """Return the untrained network.

    Inputs are places in tables, int32 (rows, notes): `pitch` (1 + place in `PITCHES`, 0 for none), `duration` likewise,
    and `place`, the sixteenths since the beginning at which the next note sets in, modulo a bar. Outputs are the logits
    of the next note (rows, notes, 235).
    """
    import keras

    names = {"pitch": len(PITCHES) + 1, "duration": len(DURATIONS) + 1, "place": BAR}
    inputs = {name: keras.Input(shape=(None,), dtype="int32", name=name) for name in names}
    embedded = [
        keras.layers.Embedding(size, WIDTHS[name], name=f"{name}_embedding")(inputs[name])
        for name, size in names.items()
    ]
    x = keras.layers.Concatenate(name="note")(embedded)
    x = keras.layers.Dropout(DROPOUT, name="note_dropout")(x)
    memory = keras.layers.LSTM(UNITS, return_sequences=True, return_state=True, name="memory")
    x, *_ = memory(x, mask=keras.ops.not_equal(inputs["duration"], 0))
    x = keras.layers.Concatenate(name="memory_and_place")([x, embedded[-1]])
    x = keras.layers.Dropout(DROPOUT, name="dropout")(x)
    return keras.Model(inputs, keras.layers.Dense(CLASSES, name="logits")(x), name="melody")


def train(model: Any, melodies: list[Classes]) -> None:
    """Train `model` in place to name each note of `melodies` after those before it, and the end."""
    import keras

    longest = max(map(len, melodies))
    notes = np.zeros((len(melodies), longest), np.int32)
    weights = np.zeros((len(melodies), longest), np.float32)
    for row, melody in enumerate(melodies):
        notes[row, : len(melody)] = melody
        weights[row, : len(melody)] = 1
    before = np.pad(notes, ((0, 0), (1, 0)))[:, :-1]
    inputs = dict(zip(("pitch", "duration"), (PLACES_OF_CLASS[before, part] for part in (0, 1)), strict=True))
    inputs["place"] = np.cumsum(LENGTH_OF_CLASS[before], axis=1) % BAR
    steps = EPOCHS * -(-len(melodies) // BATCH_ROWS)
    rate = keras.optimizers.schedules.CosineDecay(LEARNING_RATE, steps)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.AdamW(rate, weight_decay=WEIGHT_DECAY), loss=loss)
    model.fit(inputs, notes, sample_weight=weights, epochs=EPOCHS, batch_size=BATCH_ROWS, verbose=0)


def make_player(network: Any) -> Any:
    """Return the `tf.Module` that is served: `next_note` and `generate` over the trained `network`."""
    import tensorflow as tf

    nearest = [1 + int(np.abs(np.array(DURATIONS) - length).argmin()) for length in range(DURATIONS[-1] + 1)]
    pitch_places = tf.constant([1 + PITCHES.index(int(p)) for p in CLIPPED_PITCHES], tf.int32)
    duration_places = tf.constant([0, *nearest[1:]], tf.int32)
    note_places = tf.constant(PLACES_OF_CLASS)
    notes = tf.constant([note_of(number) for number in range(CLASSES)], tf.int32)
    names = ("pitch", "duration", "place")
    embeddings = [network.get_layer(f"{name}_embedding") for name in names]
    memory, head = network.get_layer("memory"), network.get_layer("logits")
    whole, one = tf.TensorSpec([None, None], tf.int32), tf.TensorSpec([None], tf.float32)

    def logits(state: Any, elapsed: Any) -> Any:
        return head(tf.concat([state, embeddings[2](elapsed % BAR)], axis=-1))

    def read(pitch: Any, duration: Any) -> tuple[Any, Any, Any]:
        """The memory's states (rows, 96) after the notes, and the sixteenths that they take (rows,)."""
        duration = tf.clip_by_value(tf.pad(duration, [[0, 0], [1, 0]]), 0, DURATIONS[-1])
        pitch = tf.clip_by_value(tf.pad(pitch, [[0, 0], [1, 0]]), 0, len(CLIPPED_PITCHES) - 1)
        is_note = duration > 0
        elapsed = tf.cumsum(duration, axis=1)
        places = (
            tf.where(is_note, tf.gather(pitch_places, pitch), 0),
            tf.gather(duration_places, duration),
            elapsed % BAR,
        )
        x = tf.concat([layer(place) for layer, place in zip(embeddings, places, strict=True)], axis=-1)
        _, output, carry = memory(x, mask=is_note, training=False)
        return output, carry, elapsed[:, -1]

    class Player(tf.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            # TensorFlow's own variables: of Keras's a SavedModel has no operation that restores them in a session.
            self.weights = [weight.value for layer in (*embeddings, memory, head) for weight in layer.weights]

        @tf.function(input_signature=[whole, whole])  # type: ignore[untyped-decorator]
        def next_note(self, pitch: Any, duration: Any) -> dict[str, Any]:
            state, _, elapsed = read(pitch, duration)
            return {"next_note": tf.nn.softmax(logits(state, elapsed))}

        @tf.function(  # type: ignore[untyped-decorator]
            input_signature=[whole, whole, tf.TensorSpec([None, None], tf.float32), one]
        )
        def generate(self, pitch: Any, duration: Any, uniform: Any, temperature: Any) -> dict[str, Any]:
            steps = tf.shape(uniform)[1]
            heat = tf.maximum(temperature, MIN_TEMPERATURE)[:, tf.newaxis]

            def draw(step: Any, state: Any, carry: Any, elapsed: Any, is_over: Any, drawn: Any) -> tuple[Any, ...]:
                reached = (
                    tf.cumsum(tf.nn.softmax(logits(state, elapsed) / heat), axis=-1) <= uniform[:, step, tf.newaxis]
                )
                number = tf.minimum(tf.reduce_sum(tf.cast(reached, tf.int32), axis=-1), CLASSES - 1)
                number = tf.where(is_over, 0, number)
                elapsed += tf.gather(notes, number)[:, 1]
                places = tf.gather(note_places, number)
                each = zip(embeddings, (places[:, 0], places[:, 1], elapsed % BAR), strict=True)
                state, (_, carry) = memory.cell(tf.concat([layer(place) for layer, place in each], -1), [state, carry])
                return step + 1, state, carry, elapsed, number == 0, drawn.write(step, number)

            state, carry, elapsed = read(pitch, duration)
            drawn = tf.TensorArray(tf.int32, size=steps, element_shape=[None])
            first = (0, state, carry, elapsed, tf.zeros_like(elapsed, tf.bool), drawn)
            *_, drawn = tf.while_loop(lambda step, *_: step < steps, draw, first)
            melody = tf.gather(notes, tf.transpose(drawn.stack()))
            return {"pitch": melody[..., 0], "duration": melody[..., 1]}

    return Player()


def save_model(player: Any, path: Path) -> None:
    """Replace the SavedModel at `path`."""
    import tensorflow as tf

    shutil.rmtree(path, ignore_errors=True)
    signatures = {"serving_default": player.next_note, "generate": player.generate}
    tf.saved_model.save(player, str(path), signatures=signatures)


def main() -> None:
    """Train, measure on the melodies held out, and write the model, its labels and the example request.

    Raises:
        SystemExit: the goal is missed, or is no better than the bigram model; the files on disk stay as they were.
    """
    import keras

    keras.utils.set_random_seed(SEED)
    network = build()
    train(network, load_data().train)
    player = make_player(network)
    inputs, truth = held_out()
    value = score({name: part.numpy() for name, part in player.next_note(**inputs).items()}, truth)
    bigram = bigram_perplexity()
    print(f"{METRIC} of the bigram model: {bigram:.2f}")
    print(f"{METRIC} {value:.4f} (goal {GOAL})")
    if not value <= GOAL < bigram:
        raise SystemExit("not saved: the goal is missed")

    save_model(player, FOLDER / "1")
    labels = "\n".join(map(label_of, range(CLASSES)))
    (FOLDER / "labels.txt").write_text(labels + "\n", encoding="utf-8")
    row = EXAMPLE_NOTES
    notes = {name: part[row, -EXAMPLE_NOTES:].tolist() for name, part in inputs.items()}
    (FOLDER / "example.json").write_text(json.dumps({"instances": [notes]}) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
