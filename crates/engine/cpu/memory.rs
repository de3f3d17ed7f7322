//! Cache-line aligned f32 storage: the vector loads of the packed weights must not straddle lines.

use crate::Error;

const LINE: usize = 16;

#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Line([f32; LINE]);

/// A zero-initialised, 64-byte aligned slice of f32.
pub(super) struct Aligned {
    lines: Vec<Line>,
    len: usize,
}

impl Aligned {
    /// `len` zeros. Errors: no memory.
    pub(super) fn zeroed(len: usize) -> Result<Self, Error> {
        let count = len.div_ceil(LINE);
        let mut lines = Vec::new();
        lines.try_reserve_exact(count).map_err(|_| Error::OutOfMemory { bytes: len * 4 })?;
        lines.resize(count, Line([0.0; LINE]));
        Ok(Self { lines, len })
    }
}

impl std::ops::Deref for Aligned {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        // SAFETY: Line is repr(C) around [f32; 16] without padding (size 64 = align 64), so the vector's lines are
        // `lines.len() * 16 >= len` consecutive initialised f32, and f32 needs less alignment than Line.
        unsafe { std::slice::from_raw_parts(self.lines.as_ptr().cast(), self.len) }
    }
}

impl std::ops::DerefMut for Aligned {
    fn deref_mut(&mut self) -> &mut [f32] {
        // SAFETY: as in `deref`; the exclusive borrow of `self` makes the slice exclusive.
        unsafe { std::slice::from_raw_parts_mut(self.lines.as_mut_ptr().cast(), self.len) }
    }
}

/// A row-major matrix `[rows, cols]`.
pub struct Mat {
    data: Aligned,
    /// Rows there is room for.
    pub rows: usize,
    /// Columns, also the row stride.
    pub cols: usize,
}

impl Mat {
    /// A matrix of zeros. Errors: no memory.
    pub fn zeroed(rows: usize, cols: usize) -> Result<Self, Error> {
        Ok(Self { data: Aligned::zeroed(rows * cols)?, rows, cols })
    }

    /// The first `rows` rows.
    pub fn head(&self, rows: usize) -> &[f32] {
        assert!(rows <= self.rows, "{rows} rows asked of a matrix of {}", self.rows);
        &self.data[..rows * self.cols]
    }

    /// The first `rows` rows, to write.
    pub fn head_mut(&mut self, rows: usize) -> &mut [f32] {
        assert!(rows <= self.rows, "{rows} rows asked of a matrix of {}", self.rows);
        &mut self.data[..rows * self.cols]
    }

    /// Row `row`.
    pub fn row(&self, row: usize) -> &[f32] {
        &self.data[row * self.cols..][..self.cols]
    }
}
