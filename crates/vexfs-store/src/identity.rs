//! `volume.toml`: which volume this is and which version wrote it.

use serde::{Deserialize, Serialize};

use crate::disk::{Disk, read_small, write_small};
use crate::error::OpenError;

/// The state directory's version that this build reads and writes.
pub const FORMAT_VERSION: u32 = 1;

/// The file's name in the state directory.
pub const NAME: &str = "volume.toml";
/// The last line: CRC-32C of all bytes before it. Absent where an older build wrote the file.
const SEAL: &str = "crc32c = ";

#[derive(Serialize, Deserialize)]
struct VolumeFile {
    format: u32,
    uuid: String,
    crc32c: Option<String>,
}

/// The volume's UUID; of a state directory that is new, made.
pub fn open(disk: &dyn Disk) -> Result<String, OpenError> {
    match read_small(disk, NAME).map_err(io)? {
        Some(bytes) => read(&bytes),
        None => {
            let uuid = new_uuid().map_err(io)?;
            write(disk, &uuid)?;
            Ok(uuid)
        }
    }
}

/// The UUID in the file's bytes.
pub fn read(bytes: &[u8]) -> Result<String, OpenError> {
    let malformed = |why: &dyn ToString| OpenError::VolumeFile(why.to_string());
    let text = std::str::from_utf8(bytes).map_err(|error| malformed(&error))?;
    let file: VolumeFile = toml::from_str(text).map_err(|error| malformed(&error.message()))?;
    if let Some(at) = text.rfind(SEAL).filter(|_| file.crc32c.is_some())
        && text[at..] != sealed(&text[..at])
    {
        return Err(malformed(&"its bytes are not those that were written"));
    }
    if file.format != FORMAT_VERSION {
        return Err(OpenError::Version { found: file.format, supported: FORMAT_VERSION });
    }
    Ok(file.uuid)
}

/// Replaces the file.
pub fn write(disk: &dyn Disk, uuid: &str) -> Result<(), OpenError> {
    let text = format!("# A VexFS volume's state. Don't edit.\nformat = {FORMAT_VERSION}\nuuid = \"{uuid}\"\n");
    let seal = sealed(&text);
    write_small(disk, NAME, (text + &seal).as_bytes()).map_err(io)
}

fn sealed(text: &str) -> String {
    format!("{SEAL}\"{:08x}\"\n", crc32c::crc32c(text.as_bytes()))
}

fn io(source: std::io::Error) -> OpenError {
    OpenError::Io { what: NAME.to_owned(), source }
}

/// A random UUID (RFC 9562, version 4) from the kernel's generator.
pub fn new_uuid() -> std::io::Result<String> {
    let mut b = [0u8; 16];
    rustix::rand::getrandom(&mut b, rustix::rand::GetRandomFlags::empty())?;
    b[6] = b[6] & 0x0f | 0x40;
    b[8] = b[8] & 0x3f | 0x80;
    let hex: String = b.iter().map(|byte| format!("{byte:02x}")).collect();
    Ok([&hex[..8], &hex[8..12], &hex[12..16], &hex[16..20], &hex[20..]].join("-"))
}
