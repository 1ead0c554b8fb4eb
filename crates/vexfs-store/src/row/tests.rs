use super::*;

#[test]
fn a_fingerprint_is_kept_exactly() {
    let (least, most) = (i128::from(i64::MIN), i128::from(i64::MAX));
    let times = [0, -1, -2, 1, least, least - 1, least - 2, most, most - 1, most + 1, i128::MIN, i128::MAX];
    for mtime in times {
        for ctime in times {
            let print = Fingerprint { size: u64::MAX, mtime, ctime };
            assert_eq!(Print::from(print).get(), print);
        }
    }
}

#[test]
fn names_are_kept_in_order() {
    let link = |parent: u64, name: &[u8]| Link { parent: FileId(parent), name: name.to_vec() };
    let all = [link(1, b"a.vec"), link(u64::MAX, &[b'x'; 255]), link(2, b""), link(2, b"a.vec")];
    let mut links = Links::default();
    for (n, link) in all.iter().enumerate() {
        assert!(!links.contains(link));
        links.add(link);
        assert!(links.contains(link));
        assert_eq!(links.to_vec(), all[..=n]);
    }
    links.remove(&all[1]);
    assert_eq!(links.to_vec(), [all[0].clone(), all[2].clone(), all[3].clone()]);
    all.iter().for_each(|link| links.remove(link));
    assert!(links.is_empty());
}
