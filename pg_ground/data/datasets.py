"""The questions of one source by index."""

import numpy as np
from jaxtyping import Bool, Int
from PIL import Image

from pg_ground.config import Data, Source
from pg_ground.data.batch_rows import check_box_count
from pg_ground.data.examples import check_formats, image_value, is_count, to_example
from pg_ground.data.frames import Frame, find_frame, recorded_size
from pg_ground.data.images import open_oriented
from pg_ground.data.masks import whole_masks
from pg_ground.data.record_fields import count_elements, field_at, list_path, with_setting
from pg_ground.data.records import BadRecord, Records, image_folder
from pg_ground.data.sampling import sample_indices
from pg_ground.data.sources import filter_records, open_records, with_dir
from pg_ground.types import Example, JsonDict, UserError


class Examples:
    """The questions of one source. Indexing raises `BadRecord` if a record cannot be used.

    A record is one question, or one question for each element of a list in it.
    """

    def __init__(
        self,
        name: str,
        source: Source,
        records: Records,
        data: Data,
        image_size: int,
        seed: int = 0,
        cut_answers: bool = False,
    ):
        self.name = name
        self.cut_answers = cut_answers
        self.source = source
        self._records = records
        self._data = data
        self._image_size = image_size
        self._seed = seed
        self._folder = image_folder(records, source)
        kept = filter_records(records, source, name)
        count = len(kept.indices)
        self._record_indices = kept.indices[sample_indices(count, source.sampling, seed)]
        if not len(self._record_indices):
            raise UserError(
                f"source {name}: sampling {source.sampling!r} keeps none of {count} records"
            )
        self.filter_note = kept.note
        """How many records `source.where` keeps, in words; "" without a filter."""
        self._list_path = list_path(source)
        self._starts = self._first_questions() if self._splits_lists() else None

    @property
    def notes(self) -> tuple[str, ...]:
        """How the reader of the source understood it, in words."""
        of_filter = (self.filter_note,) if self.filter_note else ()
        return (*of_filter, *getattr(self._records, "notes", ()))

    def _splits_lists(self) -> bool:
        return bool(self._list_path) and self.source.element == "all"

    def _first_questions(self) -> Int[np.ndarray, " records_and_1"]:
        """Returns the number of the first question of each record, and the number of all questions.

        A bad record counts as one question, so that the question shows what is wrong with it.
        """
        counts = [0]
        for index in self._record_indices:
            try:
                counts.append(count_elements(self._records[int(index)], self._list_path))
            except BadRecord:
                counts.append(1)
        return np.cumsum(counts)

    def __len__(self) -> int:
        return len(self._record_indices) if self._starts is None else int(self._starts[-1])

    def locate(self, index: int) -> tuple[int, int]:
        """Returns the number of the record of question `index`, and the element of its list."""
        if self._starts is None:
            return int(self._record_indices[index]), 0
        row = int(np.searchsorted(self._starts, index, side="right")) - 1
        return int(self._record_indices[row]), index - int(self._starts[row])

    def record(self, index: int, draw: int = 0) -> tuple[JsonDict, int]:
        """Returns the record of question `index`, and the element of its list.

        If the source draws elements at random, the element depends on the number `draw`.
        """
        number, element = self.locate(index)
        record = self._records[number]
        if self._list_path and self.source.element == "random":
            count = count_elements(record, self._list_path)
            if not count:
                raise BadRecord("empty", f"{self._list_path} is empty")
            element = int(np.random.default_rng([self._seed, index, draw]).integers(count))
        return record, element

    def mask(self, index: int, size: tuple[int, int]) -> Bool[np.ndarray, "H W"]:
        """Returns the mask of the only object of question `index`, in pixels of the image.

        A mask that is no image of this size keeps its own size, if the record states no other size.

        Args:
          index: number of the question.
          size: width and height of the image in pixels.

        Raises:
          BadRecord: bad_mask, or missing_field.
        """
        record, element = self.record(index)
        value = field_at(record, self.source.mask, element)
        recorded = recorded_size(record, self.source, element)
        frame = Frame(size, 1, "")
        if recorded not in (None, size) or self.source.frame == "stored":
            image = image_value(record, self.source, element, self._data.fetch)
            opened = open_oriented(image, self._folder, self._data.deep_images)
            frame = find_frame(recorded, opened, self.source.frame)
        mask = whole_masks(value, 1, frame.size, self._folder, frame.orientation)[0]
        if mask.shape == size[::-1] or frame.size == size:
            return mask
        return np.asarray(Image.fromarray(mask).resize(size, Image.Resampling.NEAREST))

    def __getitem__(self, index: int) -> Example:
        return self.example(index)

    def example(self, index: int, draw: int = 0) -> Example:
        """Returns question `index`.

        If the source draws elements at random, the element depends on the number `draw`.

        Raises:
          BadRecord: the record cannot be used.
        """
        try:
            record, element = self.record(index, draw)
            example = to_example(
                record,
                self.source,
                self.name,
                index,
                self._image_size,
                self._folder,
                element=element,
                seed=self._seed,
                resize_by=self._data.resize,
                deep_images=self._data.deep_images,
                mask_size=self._data.mask_size,
                fetch=self._data.fetch,
            )
            if is_count(self.source, example.suffix):
                example = _without_surplus(example, self._data.max_boxes)
            check_box_count(example, self._data)
        except BadRecord as error:
            bad = with_setting(error, self.source)
            number, element = self.locate(index)
            if number == index and not self._list_path:
                raise bad from None
            where = f"record {number}" + (f", element {element}" if self._list_path else "")
            raise BadRecord(bad.kind, f"{where}: {bad}") from None
        return example


def _without_surplus(example: Example, max_boxes: int) -> Example:
    """Returns an example without its objects if they do not fit.

    The answer to a counting question is a number. The objects only help to look at it.
    """
    if max(len(example.boxes.yxyx), len(example.points.yx)) <= max_boxes:
        return example
    boxes, points = (
        type(slots)(*(leaf[:0] for leaf in slots)) for slots in (example.boxes, example.points)
    )
    return example._replace(boxes=boxes, points=points, masks=example.masks[:0], names=())


def open_examples(
    source_name: str,
    source: Source,
    data: Data,
    image_size: int,
    seed: int = 0,
    cut_answers: bool = False,
) -> Examples:
    """Returns the questions of one source.

    Args:
      source_name: its name in the config, as `grpo/photos` or `photos`; errors name it.
      source: the config entry.
      data: settings that all sources share.
      image_size: pixels, square.
      seed: of sampling and of random choices among objects and elements.
      cut_answers: whether the rows of a batch cut an answer in loc tokens at `data.suffix_length`.
        An evaluation does, because it compares the objects of a question, not the text.

    Raises:
      UserError: the source cannot be opened, or its entry names a format that does not exist.
    """
    source = with_dir(source, data.dir)
    check_formats(source, source_name)
    records = open_records(
        source.uri,
        source_name,
        source.empty == "keep",
        source.flat_boxes == "bad",
        source.suffix == "count",
    )
    return Examples(source_name, source, records, data, image_size, seed, cut_answers)
