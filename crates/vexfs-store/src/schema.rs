//! What a collection's vectors are: declared by `.vexfs.toml`, completed by the first vector.

use serde::{Deserialize, Serialize};
use vexfs_index::{Element, Metric, Params, Quantization, Space, SpaceError};

/// The settings of a `.vexfs.toml`; what it leaves out is inferred from the first vector or has a default.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Numbers in a vector; inferred from the first one.
    pub dimension: Option<usize>,
    /// `cosine` (default), `l2`, `ip`; `hamming` (default for bits).
    pub metric: Option<String>,
    /// `f32`, `f16`, `i8`, `u8`; inferred from the first file. `bits` goes with `hamming`.
    pub element: Option<String>,
    /// The codes that the graph is walked on: `sq8` (default), `sq4`, `rabitq`, `none`. Bits are their own codes.
    pub quantization: Option<String>,
    /// Links of a node in the upper layers; twice as many in layer 0. Default 16.
    pub m: Option<usize>,
    /// Candidates kept while a node is linked. Default 200.
    pub ef_construction: Option<usize>,
}

/// A setting of a `.vexfs.toml` that can't be.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{key}: {message}")]
pub struct ConfigError {
    /// The setting's name.
    pub key: &'static str,
    /// Why not, and what would do.
    pub message: String,
}

impl Config {
    /// Reads a `.vexfs.toml`; the error is one line with its place.
    pub fn parse(text: &str) -> Result<Config, String> {
        let config: Config = toml::from_str(text).map_err(|error| {
            let line = error.span().map_or(1, |span| 1 + text[..span.start].matches('\n').count());
            format!("line {line}: {}", error.message())
        })?;
        config.check().map_err(|error| error.to_string())?;
        Ok(config)
    }

    fn check(&self) -> Result<(), ConfigError> {
        let metric = self.metric()?;
        let element = self.element()?.unwrap_or(Element::F32);
        let params = self.params()?;
        if element == Element::Bits && matches!(params.quantization, Quantization::Sq4 | Quantization::Rabitq) {
            return Err(ConfigError {
                key: "quantization",
                message: format!("{} is for numbers; bits are their own codes", params.quantization),
            });
        }
        Space::new(self.dimension.unwrap_or(1), metric, element).map_err(|error| {
            let key = if matches!(error, SpaceError::Mismatch { .. }) { "metric" } else { "dimension" };
            ConfigError { key, message: error.to_string() }
        })?;
        Ok(())
    }

    fn metric(&self) -> Result<Metric, ConfigError> {
        let Some(name) = &self.metric else {
            let bits = self.element.as_deref() == Some("bits");
            return Ok(if bits { Metric::Hamming } else { Metric::Cosine });
        };
        match name.parse() {
            Err(_) => Err(ConfigError {
                key: "metric",
                message: format!("\"{name}\" is none of \"cosine\", \"l2\", \"ip\", \"hamming\""),
            }),
            Ok(metric) => Ok(metric),
        }
    }

    fn element(&self) -> Result<Option<Element>, ConfigError> {
        let Some(name) = &self.element else {
            let bits = self.metric.as_deref() == Some("hamming");
            return Ok(bits.then_some(Element::Bits));
        };
        match name.parse() {
            Err(_) => Err(ConfigError {
                key: "element",
                message: format!("\"{name}\" is none of \"f32\", \"f16\", \"i8\", \"u8\", \"bits\""),
            }),
            Ok(element) => Ok(Some(element)),
        }
    }

    fn params(&self) -> Result<Params, ConfigError> {
        let mut params = Params::default();
        if let Some(name) = &self.quantization {
            params.quantization = name.parse::<Quantization>().map_err(|_| ConfigError {
                key: "quantization",
                message: format!("\"{name}\" is none of \"sq8\", \"sq4\", \"rabitq\", \"none\""),
            })?;
        }
        if let Some(m) = self.m {
            if !(2..=128).contains(&m) {
                let message = format!("{m} is not between 2 and 128");
                return Err(ConfigError { key: "m", message });
            }
            params.m = m;
        }
        if let Some(ef) = self.ef_construction {
            if !(8..=4096).contains(&ef) {
                let message = format!("{ef} is not between 8 and 4096");
                return Err(ConfigError { key: "ef_construction", message });
            }
            params.ef_construction = ef;
        }
        Ok(params)
    }

    /// Completes the settings by the first vector's dimension and element.
    pub fn complete(&self, dimension: usize, element: Element) -> Result<Schema, SpaceError> {
        // `check` ran when the settings were read; defaults keep this total.
        let metric = self.metric().unwrap_or(Metric::Cosine);
        let element = self.element().ok().flatten().unwrap_or(element);
        let space = Space::new(self.dimension.unwrap_or(dimension), metric, element)?;
        Ok(Schema { space, params: self.params().unwrap_or_default() })
    }
}

/// A collection's settings, complete.
#[derive(Clone, Debug)]
pub struct Schema {
    /// Dimension, metric and element type.
    pub space: Space,
    /// How its graphs are built.
    pub params: Params,
}
