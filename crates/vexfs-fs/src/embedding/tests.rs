use super::*;

fn text(text: &str) -> Result<Vec<f32>, Errno> {
    Value::new(Form::Text, text.as_bytes().to_vec()).vector().map_err(|refusal| refusal.errno)
}

#[test]
fn text_is_taken_with_and_without_brackets() {
    for same in ["[0.5, -2, 1e3]", "0.5 -2 1e3", "0.5,-2,1e3", " [ 0.5 , -2 , 1e3 ] \n", "[0.5, -2, 1e3]\0"] {
        assert_eq!(text(same), Ok(vec![0.5, -2.0, 1000.0]), "{same}");
    }
}

#[test]
fn what_is_no_vector_is_refused() {
    for bad in ["", "[]", "[1, 2", "1, 2]", "[", "]", "[[1]]", "[1,,2]", "[1, x]", "[nan]", "[1e99]", "[1, 2,]"] {
        assert_eq!(text(bad), Err(Errno::INVAL), "{bad}");
    }
    let binary = |bytes: &[u8]| Value::new(Form::Binary, bytes.to_vec()).vector().map_err(|refusal| refusal.errno);
    assert_eq!(binary(&[0, 0, 0]), Err(Errno::INVAL));
    assert_eq!(binary(&[]), Err(Errno::INVAL));
    assert_eq!(binary(&f32::NAN.to_le_bytes()), Err(Errno::INVAL));
    assert_eq!(binary(&1.5f32.to_le_bytes()), Ok(vec![1.5]));
}

#[test]
fn text_and_binary_are_each_others() {
    let vector = vec![0.1, -3.4e38, 1e-45, 0.333_333_34, 7.0];
    assert_eq!(text(std::str::from_utf8(&to_text(&vector)).unwrap()), Ok(vector.clone()));
    assert_eq!(Value::new(Form::Binary, to_binary(&vector)).vector().unwrap(), vector);
}

#[test]
fn another_value_has_another_fingerprint() {
    let stat = rustix::fs::stat("/").unwrap();
    let print = |bytes: &[u8]| Value::new(Form::Binary, bytes.to_vec()).fingerprint(&stat);
    assert_eq!(print(b"abcd"), print(b"abcd"));
    assert_ne!(print(b"abcd").mtime, print(b"abce").mtime);
}
