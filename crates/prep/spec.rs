//! preprocessor_config.json: the size and the normalisation that a model expects.
//!
//! Only the steps that the published BLIP models use exist here. A file that asks for another step is refused by name:
//! silently wrong pixels would give plausible scores.

use crate::Error;
use serde_json::Value;

/// How pixels become model input.
#[derive(Clone, Debug, PartialEq)]
pub struct ImageSpec {
    /// Side of the square model input, in pixels.
    pub size: usize,
    /// Per channel, in units of the rescaled values.
    pub mean: [f32; 3],
    /// Per channel, in units of the rescaled values.
    pub std: [f32; 3],
    /// Factor from 0..=255 to the range of `mean` and `std`.
    pub rescale: f64,
}

/// A size beyond this is a mistake in the file: position tables end long before.
const SIZE_MAX: u64 = 4096;

impl ImageSpec {
    /// The published values at another input size.
    #[must_use]
    pub fn blip(size: usize) -> Self {
        Self {
            size,
            mean: [0.481_454_66, 0.457_827_5, 0.408_210_73],
            std: [0.268_629_54, 0.261_302_6, 0.275_777_1],
            rescale: 0.003_921_568_627_450_98,
        }
    }

    /// Reads a preprocessor_config.json. Absent keys and nulls mean the published values; `do_pad` and `size_divisor` have
    /// no effect on square output and are ignored, as is everything unknown.
    ///
    /// # Errors
    /// When the bytes are not JSON, or ask for preprocessing that is not implemented.
    pub fn from_json(json: &[u8]) -> Result<Self, Error> {
        let config: Value = serde_json::from_slice(json)?;
        let field = |name: &'static str| config.get(name).filter(|value| !value.is_null());
        for step in ["do_resize", "do_rescale", "do_normalize", "do_convert_rgb"] {
            expect(step, field(step), "true", |value| (value == true).then_some(()))?;
        }
        expect("do_center_crop", field("do_center_crop"), "false", |value| (value == false).then_some(()))?;
        expect("resample", field("resample"), "3 (bicubic)", |value| (value == 3).then_some(()))?;
        let published = Self::blip(384);
        let positive = |value: &Value| value.as_f64().filter(|v| *v > 0.0 && v.is_finite());
        Ok(Self {
            size: expect("size", field("size"), "one number or equal height and width", side)?
                .unwrap_or(published.size),
            mean: expect("image_mean", field("image_mean"), "three numbers", three)?.unwrap_or(published.mean),
            std: expect("image_std", field("image_std"), "three positive numbers", |value| {
                three(value).filter(|std| std.iter().all(|v| *v > 0.0))
            })?
            .unwrap_or(published.std),
            rescale: expect("rescale_factor", field("rescale_factor"), "a positive number", positive)?
                .unwrap_or(published.rescale),
        })
    }

    /// `lut[channel][value]`: the model input for an 8-bit sample. The product is rounded to f32 before the mean is taken
    /// off, which is what the reference does; fused forms differ in the last bit.
    #[must_use]
    pub fn pixel_lut(&self) -> [[f32; 256]; 3] {
        std::array::from_fn(|channel| {
            std::array::from_fn(|value| ((value as f64 * self.rescale) as f32 - self.mean[channel]) / self.std[channel])
        })
    }
}

/// An absent value is fine, a present one must parse.
fn expect<T>(
    field: &'static str,
    value: Option<&Value>,
    expected: &'static str,
    parse: impl Fn(&Value) -> Option<T>,
) -> Result<Option<T>, Error> {
    let Some(value) = value else { return Ok(None) };
    match parse(value) {
        Some(parsed) => Ok(Some(parsed)),
        None => Err(Error::SpecField { field, value: value.to_string(), expected }),
    }
}

fn side(value: &Value) -> Option<usize> {
    let side = match value {
        Value::Object(size) => size.get("height").filter(|height| size.get("width") == Some(height))?,
        number => number,
    };
    side.as_u64().filter(|side| (1..=SIZE_MAX).contains(side)).and_then(|side| usize::try_from(side).ok())
}

fn three(value: &Value) -> Option<[f32; 3]> {
    let numbers: Vec<f32> = value.as_array()?.iter().map(|v| v.as_f64().map(|v| v as f32)).collect::<Option<_>>()?;
    numbers.try_into().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(json: &str) -> String {
        ImageSpec::from_json(json.as_bytes()).expect_err(json).to_string()
    }

    #[test]
    fn absent_keys_mean_the_published_values() {
        let spec = ImageSpec::from_json(b"{}").expect("empty is allowed");
        assert_eq!(spec, ImageSpec::blip(384));
        let json = br#"{"size": 64, "do_pad": true, "size_divisor": 32, "do_resize": null, "image_mean": [0, 0.5, 1]}"#;
        let spec = ImageSpec::from_json(json).expect("valid");
        assert_eq!((spec.size, spec.mean), (64, [0.0, 0.5, 1.0]));
        let spec = ImageSpec::from_json(br#"{"size": {"height": 32, "width": 32}}"#).expect("valid");
        assert_eq!(spec.size, 32);
    }

    #[test]
    fn other_preprocessing_is_refused_by_name() {
        for (json, field) in [
            (r#"{"resample": 2}"#, "resample = 2"),
            (r#"{"do_resize": false}"#, "do_resize = false"),
            (r#"{"do_normalize": false}"#, "do_normalize = false"),
            (r#"{"do_rescale": false}"#, "do_rescale = false"),
            (r#"{"do_center_crop": true}"#, "do_center_crop = true"),
            (r#"{"size": {"shortest_edge": 384}}"#, "shortest_edge"),
            (r#"{"size": {"height": 384, "width": 256}}"#, "size = "),
            (r#"{"size": 0}"#, "size = 0"),
            (r#"{"image_std": [1, 0, 1]}"#, "image_std"),
            (r#"{"image_mean": [1, 2]}"#, "image_mean"),
            (r#"{"rescale_factor": 0}"#, "rescale_factor"),
        ] {
            assert!(message(json).contains(field), "{json}: {}", message(json));
        }
        assert!(message("not json").contains("preprocessor_config.json"));
    }
}
