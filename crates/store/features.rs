//! The `huggingface` entry of a shard's metadata, which tells the `datasets` library what each column is. Old versions
//! believe it blindly and fail on columns it does not list, so it must follow the columns of the output.
//!
//! Everything but the list of features stays as it was, byte by byte and in its order.

use arrow_schema::{DataType, FieldRef};
use serde::de::{Deserialize, Deserializer, MapAccess, Visitor};
use serde::ser::{Serialize, SerializeMap, Serializer};
use serde_json::value::RawValue;

/// `text` with features for `scores`, and without those of columns that are no longer in `fields`. None when it is not
/// of the expected shape; it is then better left alone.
pub(crate) fn update(text: &str, fields: &[FieldRef], scores: &[FieldRef]) -> Option<String> {
    let mut outer: Ordered = serde_json::from_str(text).ok()?;
    let mut info: Ordered = serde_json::from_str(outer.get("info")?.get()).ok()?;
    let mut features: Ordered = serde_json::from_str(info.get("features")?.get()).ok()?;
    let is_score = |name: &str| scores.iter().any(|field| field.name() == name);
    features.0.retain(|(name, _)| !is_score(name) && fields.iter().any(|field| field.name() == name));
    for field in scores {
        let feature = RawValue::from_string(feature(field.data_type())?).ok()?;
        features.0.push((field.name().clone(), feature));
    }
    info.set("features", raw(&features)?);
    outer.set("info", raw(&info)?);
    serde_json::to_string(&outer).ok()
}

fn feature(data_type: &DataType) -> Option<String> {
    let value = |dtype: &str| format!(r#"{{"dtype": "{dtype}", "_type": "Value"}}"#);
    Some(match data_type {
        DataType::Float32 => value("float32"),
        DataType::Int32 => value("int32"),
        DataType::Boolean => value("bool"),
        DataType::Utf8 => value("string"),
        // Written `List` by new versions, which still read `Sequence`; old ones know nothing else.
        DataType::List(item) => {
            format!(r#"{{"feature": {}, "_type": "Sequence"}}"#, feature(item.data_type())?)
        }
        _ => return None,
    })
}

fn raw(object: &Ordered) -> Option<Box<RawValue>> {
    serde_json::value::to_raw_value(object).ok()
}

/// A JSON object in the order it was written; its values are not looked into.
struct Ordered(Vec<(String, Box<RawValue>)>);

impl Ordered {
    fn get(&self, key: &str) -> Option<&RawValue> {
        self.0.iter().find(|(name, _)| name == key).map(|(_, value)| value.as_ref())
    }

    fn set(&mut self, key: &str, value: Box<RawValue>) {
        if let Some((_, old)) = self.0.iter_mut().find(|(name, _)| name == key) {
            *old = value;
        }
    }
}

impl<'de> Deserialize<'de> for Ordered {
    fn deserialize<D: Deserializer<'de>>(input: D) -> Result<Self, D::Error> {
        struct Entries;
        impl<'de> Visitor<'de> for Entries {
            type Value = Ordered;

            fn expecting(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                out.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Ordered, A::Error> {
                let mut entries = Vec::new();
                while let Some(entry) = map.next_entry()? {
                    entries.push(entry);
                }
                Ok(Ordered(entries))
            }
        }
        input.deserialize_map(Entries)
    }
}

impl Serialize for Ordered {
    fn serialize<S: Serializer>(&self, output: S) -> Result<S::Ok, S::Error> {
        let mut map = output.serialize_map(Some(self.0.len()))?;
        for (key, value) in &self.0 {
            map.serialize_entry(key, value)?;
        }
        map.end()
    }
}
