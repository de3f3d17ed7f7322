//! Shards, images and the program itself, for the tests that go through files.

use std::fs::File;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::sync::Arc;
use std::sync::mpsc::channel;
use std::time::Duration;

use arrow::array::{ArrayRef, AsArray, BinaryArray, ListBuilder, RecordBatch, StringArray, StringBuilder};
use arrow::compute::concat_batches;
use arrow::datatypes::Float32Type;
#[cfg(any(feature = "cuda", feature = "emulator"))]
use capsieve_engine::Precision;
#[cfg(feature = "cuda")]
use capsieve_engine::testing::Gpu;
#[cfg(any(feature = "cuda", feature = "emulator"))]
use capsieve_engine::testing::{CudaBackend, Limits};
#[cfg(feature = "emulator")]
use capsieve_engine::testing::{Emulated, Order};
use capsieve_prep::RgbImage;
use parquet::arrow::ArrowWriter;
use parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder;
use parquet::file::properties::WriterProperties;

/// No run here takes seconds; a hang must fail, not stall the suite.
const RUN_TIMEOUT: Duration = Duration::from_secs(300);

/// How a run of the program ended.
#[derive(Debug)]
pub(crate) struct Ran {
    pub(crate) code: Option<i32>,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

/// The program with nothing of the caller's settings.
pub(crate) fn program() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_capsieve"));
    for (name, _) in std::env::vars().filter(|(name, _)| name.starts_with("CAPSIEVE_") || name.starts_with("HF_")) {
        command.env_remove(name);
    }
    // The same scores with and without a card; tests of cards say so.
    command.env("CAPSIEVE_DEVICE", "cpu");
    // No test may reach the network, whatever it asks for.
    command.env("HF_HUB_OFFLINE", "1").env_remove("RUST_LOG").env_remove("RUST_BACKTRACE");
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

/// Runs the program to its end.
pub(crate) fn run(command: &mut Command) -> Ran {
    let child = command.spawn().unwrap();
    let (ended, end) = channel();
    std::thread::spawn(move || ended.send(child.wait_with_output()));
    let output: Output = end.recv_timeout(RUN_TIMEOUT).unwrap_or_else(|_| panic!("{command:?} hangs")).unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    Ran { code: output.status.code(), stdout: text(output.stdout), stderr: text(output.stderr) }
}

/// Runs `capsieve ARGUMENTS`.
pub(crate) fn capsieve<S: AsRef<std::ffi::OsStr>>(arguments: &[S]) -> Ran {
    run(program().args(arguments))
}

/// `png` of pixels, without loss.
pub(crate) fn png(image: &RgbImage) -> Vec<u8> {
    let (width, height) = (u32::try_from(image.width).unwrap(), u32::try_from(image.height).unwrap());
    let image = image::RgbImage::from_raw(width, height, image.pixels.clone()).unwrap();
    let mut bytes = std::io::Cursor::new(Vec::new());
    image.write_to(&mut bytes, image::ImageFormat::Png).unwrap();
    bytes.into_inner()
}

/// A small picture, another one for each number.
pub(crate) fn picture(number: u64) -> Vec<u8> {
    let mut state = number.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 32) as u8
    };
    let (width, height) = (9 + (number % 7) as usize, 11 + (number % 5) as usize);
    png(&RgbImage { width, height, pixels: (0..width * height * 3).map(|_| next()).collect() })
}

/// Columns `key`, `image`, `caption`.
pub(crate) fn shard<C: AsRef<str>>(rows: &[(Option<Vec<u8>>, Option<C>)]) -> RecordBatch {
    let captions: StringArray = rows.iter().map(|(_, caption)| caption.as_ref().map(AsRef::as_ref)).collect();
    with_captions(&rows.iter().map(|(image, _)| image.clone()).collect::<Vec<_>>(), Arc::new(captions))
}

/// Image and captions.
pub(crate) type ListRow<C> = (Option<Vec<u8>>, Option<Vec<Option<C>>>);

/// Columns `key`, `image`, `caption`, the last a list.
pub(crate) fn list_shard<C: AsRef<str>>(rows: &[ListRow<C>]) -> RecordBatch {
    let mut lists = ListBuilder::new(StringBuilder::new());
    for (_, captions) in rows {
        captions.iter().flatten().for_each(|caption| lists.values().append_option(caption.as_ref()));
        lists.append(captions.is_some());
    }
    with_captions(&rows.iter().map(|(image, _)| image.clone()).collect::<Vec<_>>(), Arc::new(lists.finish()))
}

fn with_captions(images: &[Option<Vec<u8>>], captions: ArrayRef) -> RecordBatch {
    let keys: StringArray = (0..images.len()).map(|row| Some(format!("{row:05}"))).collect();
    let images: BinaryArray = images.iter().map(Option::as_deref).collect();
    RecordBatch::try_from_iter_with_nullable([
        ("key", Arc::new(keys) as ArrayRef, false),
        ("image", Arc::new(images), true),
        ("caption", captions, true),
    ])
    .unwrap()
}

/// Writes a shard in row groups of at most `group_rows` rows.
pub(crate) fn write_parquet(path: &Path, batch: &RecordBatch, group_rows: usize) {
    let properties = WriterProperties::builder().set_max_row_group_row_count(Some(group_rows)).build();
    let mut writer = ArrowWriter::try_new(File::create(path).unwrap(), batch.schema(), Some(properties)).unwrap();
    writer.write(batch).unwrap();
    writer.close().unwrap();
}

/// All rows of a shard; its schema's metadata is the file's.
pub(crate) fn read_parquet(path: &Path) -> RecordBatch {
    let file = File::open(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    let builder = ParquetRecordBatchReaderBuilder::try_new(file).unwrap();
    let schema = builder.schema().clone();
    let batches: Vec<RecordBatch> = builder.build().unwrap().map(Result::unwrap).collect();
    concat_batches(&schema, &batches).unwrap()
}

/// A column of numbers; in a column of lists, all lists' elements one after another.
pub(crate) fn floats(batch: &RecordBatch, name: &str) -> Vec<Option<f32>> {
    let column = batch.column_by_name(name).unwrap_or_else(|| panic!("no column {name}"));
    match column.as_list_opt::<i32>() {
        Some(lists) => {
            let of = |list: ArrayRef| list.as_primitive::<Float32Type>().iter().collect::<Vec<_>>();
            lists.iter().flatten().flat_map(of).collect()
        }
        None => column.as_primitive::<Float32Type>().iter().collect(),
    }
}

/// A column of strings.
pub(crate) fn texts(batch: &RecordBatch, name: &str) -> Vec<Option<String>> {
    let column = batch.column_by_name(name).unwrap_or_else(|| panic!("no column {name}"));
    column.as_string::<i32>().iter().map(|text| text.map(str::to_owned)).collect()
}

/// Names in a folder, sorted, hidden ones too.
pub(crate) fn names(folder: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(folder).unwrap();
    let mut names: Vec<String> = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort_unstable();
    names
}

/// How the emulator's threads take turns. A missing barrier shows in some of them.
#[cfg(feature = "emulator")]
pub(crate) const ORDERS: [Order; 3] = [Order::Forward, Order::Reverse, Order::Shuffled(1)];

/// The CUDA backend on the emulator, with room for `rows` text rows.
#[cfg(feature = "emulator")]
pub(crate) fn emulated(order: Order, precision: Precision, rows: usize) -> CudaBackend<Emulated> {
    let limits = Limits { images: 8, image_bytes: 384 * 384 * 3, rows };
    CudaBackend::new(Emulated::new(order).unwrap(), precision, limits).unwrap()
}

/// The CUDA backend on the first card, with room for `rows` text rows.
#[cfg(feature = "cuda")]
pub(crate) fn card(precision: Precision, rows: usize) -> CudaBackend<Gpu> {
    let limits = Limits { images: 8, image_bytes: 384 * 384 * 3, rows };
    CudaBackend::new(Gpu::open(0, precision).unwrap(), precision, limits).unwrap()
}
