//! Which columns of a shard are the image, the caption and the key: found by name and type, or named by the caller.
//! Knows schemas only; the cells are read in `rows`.

use arrow_schema::{DataType, Field, Schema};

use crate::{Error, Result};

/// Names an image column goes by, best first. `URL` is LAION's spelling.
const IMAGE_NAMES: [&str; 12] =
    ["image", "jpg", "jpeg", "png", "webp", "image_bytes", "img", "bytes", "image_path", "path", "url", "URL"];
/// Names a caption column goes by, best first.
const CAPTION_NAMES: [&str; 7] = ["caption", "captions", "text", "TEXT", "txt", "alt_text", "prompt"];
/// Names a key column goes by, best first.
const KEY_NAMES: [&str; 5] = ["key", "__key__", "id", "uid", "image_id"];
/// Columns that every Parquet file of img2dataset has, with or without images.
const IMG2DATASET_NAMES: [&str; 3] = ["key", "status", "error_message"];
/// Columns listed in an error at most; a wide table would bury the reason.
const LISTED_MAX: usize = 40;

/// The columns the user named; what is not named is detected.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ColumnOptions {
    /// `--image-column`.
    pub image: Option<String>,
    /// `--caption-column`.
    pub caption: Option<String>,
    /// `--key-column`.
    pub key: Option<String>,
}

/// How an image column holds its images.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ImageKind {
    /// Encoded images.
    Binary,
    /// Hugging Face's `struct<bytes, path>`.
    Struct,
    /// Addresses of images, absolute or relative to the shard.
    Uri,
}

/// How a caption column holds its captions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CaptionKind {
    /// One caption a row.
    Text,
    /// Any number of captions a row.
    List,
}

/// Positions among the top-level columns of a shard.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Columns {
    /// The image column.
    pub image: usize,
    /// What its cells hold.
    pub image_kind: ImageKind,
    /// The caption column.
    pub caption: usize,
    /// What its cells hold.
    pub caption_kind: CaptionKind,
    /// The key column, where there is one.
    pub key: Option<usize>,
}

impl Columns {
    /// Finds the columns of the shard `uri`.
    ///
    /// # Errors
    /// When a column is missing, ambiguous or of an unusable type. The message lists what is there.
    pub fn detect(schema: &Schema, options: &ColumnOptions, uri: &str) -> Result<Self> {
        if options.image.is_none()
            && let Some(column) = metadata_only(schema)
        {
            return Err(Error::MetadataOnly { uri: uri.to_owned(), column });
        }
        let search = Search { schema, uri };
        let (image, image_kind) = search.required(&IMAGE, options.image.as_deref(), image_kind)?;
        let (caption, caption_kind) = search.required(&CAPTION, options.caption.as_deref(), caption_kind)?;
        let key = search.key(options.key.as_deref())?;
        Ok(Self { image, image_kind, caption, caption_kind, key })
    }

    /// Whether these are columns of a schema like `schema`.
    pub(crate) fn check(&self, schema: &Schema) -> Result<()> {
        let kind_at = |index: usize| schema.fields().get(index).map(|field| field.data_type());
        let image = kind_at(self.image).and_then(image_kind) == Some(self.image_kind);
        let caption = kind_at(self.caption).and_then(caption_kind) == Some(self.caption_kind);
        if image && caption { Ok(()) } else { Err(Error::ForeignColumns) }
    }
}

/// What a column is wanted for.
struct Role {
    name: &'static str,
    option: &'static str,
    names: &'static [&'static str],
    wanted: &'static str,
}

const IMAGE: Role = Role {
    name: "image",
    option: "--image-column",
    names: &IMAGE_NAMES,
    wanted: "binary, struct<bytes: binary, path: string>, or string holding URIs",
};
const CAPTION: Role =
    Role { name: "caption", option: "--caption-column", names: &CAPTION_NAMES, wanted: "string or list of string" };

struct Search<'a> {
    schema: &'a Schema,
    uri: &'a str,
}

impl Search<'_> {
    fn required<K>(&self, role: &Role, named: Option<&str>, kind: fn(&DataType) -> Option<K>) -> Result<(usize, K)> {
        if let Some(name) = named {
            let index = self.named(name, role.option)?;
            let field = self.schema.field(index);
            return kind(field.data_type()).map(|kind| (index, kind)).ok_or_else(|| Error::ColumnType {
                uri: self.uri.to_owned(),
                name: name.to_owned(),
                data_type: field.data_type().to_string().into(),
                role: role.name,
                wanted: role.wanted,
                columns: self.columns(),
            });
        }
        // A column without a value is taken where there is no other.
        for (nothing, name) in
            [false, true].iter().flat_map(|nothing| role.names.iter().map(move |name| (nothing, name)))
        {
            let usable = |index: &usize| {
                let data_type = self.schema.field(*index).data_type();
                kind(data_type).is_some() && (*nothing || !is_nothing(data_type))
            };
            let found: Vec<usize> = self.positions(name).filter(usable).collect();
            if let [index, rest @ ..] = found.as_slice() {
                self.unique(name, 1 + rest.len(), role.option)?;
                return kind(self.schema.field(*index).data_type())
                    .map(|kind| (*index, kind))
                    .ok_or_else(|| self.none(role));
            }
        }
        Err(self.none(role))
    }

    fn key(&self, named: Option<&str>) -> Result<Option<usize>> {
        if let Some(name) = named {
            return self.named(name, "--key-column").map(Some);
        }
        let found = KEY_NAMES.iter().find_map(|name| self.positions(name).next().map(|index| (name, index)));
        let Some((name, index)) = found else { return Ok(None) };
        self.unique(name, self.positions(name).count(), "--key-column")?;
        Ok(Some(index))
    }

    fn named(&self, name: &str, option: &'static str) -> Result<usize> {
        let missing = || Error::MissingColumn {
            uri: self.uri.to_owned(),
            name: name.to_owned(),
            option,
            columns: self.columns(),
        };
        let index = self.positions(name).next().ok_or_else(missing)?;
        self.unique(name, self.positions(name).count(), option)?;
        Ok(index)
    }

    fn unique(&self, name: &str, count: usize, option: &'static str) -> Result<()> {
        if count == 1 {
            return Ok(());
        }
        let (uri, name) = (self.uri.to_owned(), name.to_owned());
        Err(Error::AmbiguousColumn { uri, name, count, option, columns: self.columns() })
    }

    fn none(&self, role: &Role) -> Error {
        Error::NoColumn {
            uri: self.uri.to_owned(),
            role: role.name,
            tried: role.names.join(", "),
            option: role.option,
            columns: self.columns(),
        }
    }

    fn positions(&self, name: &str) -> impl Iterator<Item = usize> {
        self.schema.fields().iter().enumerate().filter(move |(_, field)| field.name() == name).map(|(index, _)| index)
    }

    fn columns(&self) -> Box<str> {
        let fields = self.schema.fields();
        let line = |field: &std::sync::Arc<Field>| format!("{} ({})", field.name(), field.data_type());
        let mut listed = fields.iter().take(LISTED_MAX).map(line).collect::<Vec<_>>().join(", ");
        if fields.len() > LISTED_MAX {
            listed.push_str(&format!(" and {} more", fields.len() - LISTED_MAX));
        }
        listed.into()
    }
}

/// The URL column of a Parquet file that img2dataset wrote beside its tar files or folders of images.
fn metadata_only(schema: &Schema) -> Option<String> {
    let has = |name: &&str| schema.column_with_name(name).is_some();
    let bytes = schema
        .fields()
        .iter()
        .filter(|field| !is_nothing(field.data_type()))
        .any(|field| matches!(image_kind(field.data_type()), Some(ImageKind::Binary | ImageKind::Struct)));
    let url = ["url", "URL"].into_iter().find(has)?;
    (IMG2DATASET_NAMES.iter().all(has) && !bytes).then(|| url.to_owned())
}

fn image_kind(data_type: &DataType) -> Option<ImageKind> {
    match data_type {
        DataType::Struct(fields) => {
            let usable = |name: &str, usable: fn(&DataType) -> bool| {
                fields.find(name).map(|(_, field)| usable(field.data_type()))
            };
            let (bytes, path) = (usable("bytes", is_binary), usable("path", is_string));
            (bytes == Some(true) && path != Some(false)).then_some(ImageKind::Struct)
        }
        other if is_binary(other) => Some(ImageKind::Binary),
        other if is_string(other) => Some(ImageKind::Uri),
        _ => None,
    }
}

fn caption_kind(data_type: &DataType) -> Option<CaptionKind> {
    match data_type {
        DataType::List(item)
        | DataType::LargeList(item)
        | DataType::ListView(item)
        | DataType::LargeListView(item)
        | DataType::FixedSizeList(item, _) => is_string(item.data_type()).then_some(CaptionKind::List),
        other => is_string(other).then_some(CaptionKind::Text),
    }
}

/// Whether it has no value but null.
fn is_nothing(data_type: &DataType) -> bool {
    match data_type {
        DataType::List(item)
        | DataType::LargeList(item)
        | DataType::ListView(item)
        | DataType::LargeListView(item)
        | DataType::FixedSizeList(item, _) => is_nothing(item.data_type()),
        other => *other == DataType::Null,
    }
}

fn is_binary(data_type: &DataType) -> bool {
    match data_type {
        DataType::Dictionary(_, values) => is_binary(values),
        other => {
            matches!(other, DataType::Binary | DataType::LargeBinary | DataType::BinaryView | DataType::Null)
        }
    }
}

fn is_string(data_type: &DataType) -> bool {
    match data_type {
        DataType::Dictionary(_, values) => is_string(values),
        other => matches!(other, DataType::Utf8 | DataType::LargeUtf8 | DataType::Utf8View | DataType::Null),
    }
}
