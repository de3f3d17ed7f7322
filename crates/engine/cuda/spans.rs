//! Lists of spans on the device, for the attention kernels.
//!
//! The same lists are used by every layer, so the last ones stay where they are and are compared on the host.

use super::device::Device;
use super::kernels::Work;
use crate::Error;
use crate::backend::Span;

/// Lists that are kept: those of captions and of their images alternate from layer to layer.
const LISTS: usize = 2;

struct List<M> {
    spans: Vec<Span>,
    tile_rows: usize,
    /// Work items.
    count: usize,
    /// `[spans, 4]` i32: q, q_len, kv, kv_len
    device_spans: M,
    /// `[items, 2]` i32: span, first row
    device_items: M,
}

/// The lists, with room for spans of so many rows.
pub(super) struct Spans<D: Device> {
    rows: usize,
    lists: [List<D::Memory>; LISTS],
    /// The list used last.
    newest: usize,
    /// What is uploaded.
    bytes: Vec<u8>,
}

impl<D: Device> Spans<D> {
    /// Room for spans of `rows` query rows together. Errors: no memory.
    pub(super) fn new(device: &D, rows: usize) -> Result<Self, Error> {
        let list = || -> Result<_, Error> {
            Ok(List {
                spans: Vec::with_capacity(rows),
                tile_rows: 0,
                count: 0,
                device_spans: device.alloc(rows * 16)?,
                device_items: device.alloc(rows * 8)?,
            })
        };
        Ok(Self { rows, lists: [list()?, list()?], newest: 0, bytes: Vec::with_capacity(rows * 16) })
    }

    /// The work of `spans` cut into tiles of `tile_rows` query rows; uploaded unless it is there already.
    pub(super) fn work(&mut self, device: &D, spans: &[Span], tile_rows: usize) -> Result<Work, Error> {
        if let Some((images, tokens)) = images_of(spans) {
            return Ok(Work::Images { images, tokens });
        }
        let same = |list: &List<_>| list.tile_rows == tile_rows && list.spans == spans;
        let place = match self.lists.iter().position(same) {
            Some(place) => place,
            None => {
                let place = (self.newest + 1) % LISTS;
                self.upload(device, place, spans, tile_rows)?;
                place
            }
        };
        self.newest = place;
        let list = &self.lists[place];
        let (spans, items) = (D::address(&list.device_spans), D::address(&list.device_items));
        Ok(Work::Spans { spans, items, count: list.count })
    }

    fn upload(&mut self, device: &D, place: usize, spans: &[Span], tile_rows: usize) -> Result<(), Error> {
        let index = |value: usize| u32::try_from(value).expect("rows are limited when buffers are made").to_le_bytes();
        // A tile has at least one row, so there are no more tiles than rows.
        let rows: usize = spans.iter().map(|span| span.q_len).sum();
        assert!(spans.len() <= self.rows && rows <= self.rows, "spans of {rows} rows");
        let list = &mut self.lists[place];
        list.spans.clear();
        list.spans.extend_from_slice(spans);
        (list.tile_rows, list.count) = (tile_rows, spans.iter().map(|span| span.q_len.div_ceil(tile_rows)).sum());
        self.bytes.clear();
        self.bytes.extend(spans.iter().flat_map(|s| [s.q, s.q_len, s.kv, s.kv_len]).flat_map(index));
        device.upload(&self.bytes, D::address(&list.device_spans))?;
        let tiles = |(i, span): (usize, &Span)| (0..span.q_len).step_by(tile_rows).flat_map(move |first| [i, first]);
        self.bytes.clear();
        self.bytes.extend(spans.iter().enumerate().flat_map(tiles).flat_map(index));
        device.upload(&self.bytes, D::address(&list.device_items))
    }
}

/// Images and tokens where the spans are images that attend to themselves, one after the other.
fn images_of(spans: &[Span]) -> Option<(usize, usize)> {
    let tokens = spans.first()?.q_len;
    let image = |(i, span): (usize, &Span)| {
        span.q == i * tokens && span.kv == span.q && span.q_len == tokens && span.kv_len == tokens
    };
    spans.iter().enumerate().all(image).then_some((spans.len(), tokens))
}
