//! Cache-line aligned storage: the vector loads of the packed weights must not straddle lines.

use std::marker::PhantomData;
use std::sync::{Mutex, MutexGuard};

use super::simd::prefetch;
use crate::Error;

/// Bytes of a cache line.
pub(super) const LINE: usize = 64;

#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Line([u8; LINE]);

/// Numbers of 32 bits, for which any bits are a value.
///
/// # Safety
/// The type has 4 bytes, no alignment beyond 4, and no bits that are no value.
pub(super) unsafe trait Plain: Copy + Send + Sync {}

// SAFETY: f32 is 4 bytes of any value.
unsafe impl Plain for f32 {}
// SAFETY: u32 is 4 bytes of any value.
unsafe impl Plain for u32 {}

/// A zero-initialised, 64-byte aligned slice.
pub(super) struct Aligned<T = f32> {
    lines: Vec<Line>,
    len: usize,
    of: PhantomData<T>,
}

impl<T: Plain> Aligned<T> {
    /// `len` zeros. Errors: no memory.
    pub(super) fn zeroed(len: usize) -> Result<Self, Error> {
        let count = (4 * len).div_ceil(LINE);
        let mut lines = Vec::new();
        lines.try_reserve_exact(count).map_err(|_| Error::OutOfMemory { bytes: len * 4 })?;
        lines.resize(count, Line([0; LINE]));
        Ok(Self { lines, len, of: PhantomData })
    }

    /// Sees to room for `len` numbers, which are zeros if there was less. Errors: no memory.
    pub(super) fn reserve(&mut self, len: usize) -> Result<(), Error> {
        if self.len < len {
            *self = Self::zeroed(len)?;
        }
        Ok(())
    }
}

impl<T: Plain> std::ops::Deref for Aligned<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        // SAFETY: Line is repr(C) around [u8; 64] without padding (size 64 = align 64), so the vector's lines are
        // `lines.len() * 64 >= 4 * len` consecutive initialised bytes, any of which make a T; T needs less alignment than Line.
        unsafe { std::slice::from_raw_parts(self.lines.as_ptr().cast(), self.len) }
    }
}

impl<T: Plain> std::ops::DerefMut for Aligned<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        // SAFETY: as in `deref`; the exclusive borrow of `self` makes the slice exclusive.
        unsafe { std::slice::from_raw_parts_mut(self.lines.as_mut_ptr().cast(), self.len) }
    }
}

/// The words as the f32 that they are.
pub(super) fn floats_of(words: &[u32]) -> &[f32] {
    // SAFETY: both are 4 bytes of any value with an alignment of 4; the borrow goes on in the result.
    unsafe { std::slice::from_raw_parts(words.as_ptr().cast(), words.len()) }
}

/// The same to write.
pub(super) fn floats(words: &mut [u32]) -> &mut [f32] {
    // SAFETY: both are 4 bytes of any value with an alignment of 4; the exclusive borrow goes on in the result.
    unsafe { std::slice::from_raw_parts_mut(words.as_mut_ptr().cast(), words.len()) }
}

/// This thread's room.
pub(super) fn own<T>(rooms: &[Mutex<T>]) -> MutexGuard<'_, T> {
    let thread = rayon::current_thread_index().expect("the backend runs on its own pool");
    rooms[thread].lock().expect("no task panics while it holds its room")
}

/// A row-major matrix that tasks write to at the same time, each its own rectangles.
pub(super) struct Shared<'a> {
    start: *mut f32,
    cols: usize,
    len: usize,
    of: PhantomData<&'a mut [f32]>,
}

// SAFETY: the pointer comes from a `&mut [f32]` that is borrowed for as long as this lives; tasks reach it only through
// [`Shared::row`] and [`Rectangle::new`], whose callers promise that no two of them have the same element.
unsafe impl Sync for Shared<'_> {}

impl<'a> Shared<'a> {
    /// `matrix [rows, cols]`
    pub(super) fn new(matrix: &'a mut [f32], cols: usize) -> Self {
        Self { start: matrix.as_mut_ptr(), cols, len: matrix.len(), of: PhantomData }
    }

    pub(super) fn cols(&self) -> usize {
        self.cols
    }

    /// Columns `cols` of row `row`.
    ///
    /// # Safety
    /// No other thread may hold any of these elements.
    #[allow(clippy::mut_from_ref, reason = "disjointness is the caller's promise")]
    pub(super) unsafe fn row(&self, row: usize, cols: std::ops::Range<usize>) -> &mut [f32] {
        let first = row * self.cols + cols.start;
        assert!(cols.end <= self.cols && first + cols.len() <= self.len);
        // SAFETY: in bounds by the assertion; exclusive by the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(first), cols.len()) }
    }
}

/// A rectangle of such a matrix that is one task's.
pub(super) struct Rectangle<'a> {
    start: *mut f32,
    stride: usize,
    rows: usize,
    cols: usize,
    of: PhantomData<&'a mut [f32]>,
}

impl<'a> Rectangle<'a> {
    /// Rows `rows`, columns `cols`.
    ///
    /// # Safety
    /// Nothing else may hold any of these elements.
    pub(super) unsafe fn new(
        matrix: &'a Shared<'_>,
        rows: std::ops::Range<usize>,
        cols: std::ops::Range<usize>,
    ) -> Self {
        assert!(cols.end <= matrix.cols && rows.start < rows.end && rows.end * matrix.cols <= matrix.len);
        // SAFETY: the first element is within the matrix by the assertion.
        let start = unsafe { matrix.start.add(rows.start * matrix.cols + cols.start) };
        Self { start, stride: matrix.cols, rows: rows.len(), cols: cols.len(), of: PhantomData }
    }

    pub(super) fn rows(&self) -> usize {
        self.rows
    }

    /// A row's columns.
    #[inline(always)]
    pub(super) fn row(&mut self, row: usize) -> &mut [f32] {
        assert!(row < self.rows);
        // SAFETY: the row is one of the rectangle's, which lies in the matrix by `new`'s assertion; exclusive by its caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(row * self.stride), self.cols) }
    }

    /// Asks for the cache lines of these rows.
    #[inline]
    pub(super) fn prefetch(&mut self, rows: std::ops::Range<usize>) {
        for row in rows {
            self.row(row).chunks(LINE / size_of::<f32>()).for_each(|line| prefetch::<false, _>(line.as_ptr()));
        }
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
