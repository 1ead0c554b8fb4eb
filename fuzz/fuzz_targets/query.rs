#![no_main]
//! Any bytes as a line of the query file; what is understood is written and read back as the same.

use libfuzzer_sys::fuzz_target;
use vexfs_fs::wire::Request;

fuzz_target!(|data: &[u8]| {
    let Ok(request) = serde_json::from_slice::<Request>(data) else { return };
    let text = serde_json::to_vec(&request).expect("it was read");
    // JSON has no infinity: a number past f32 comes back as null.
    if let Ok(again) = serde_json::from_slice::<Request>(&text) {
        assert_eq!(serde_json::to_vec(&again).expect("it was read"), text);
    }
});
