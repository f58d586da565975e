//! `live-restore --metrics`, as a scraper over a plain socket meets it.

use std::collections::{HashMap, HashSet};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::os::unix::net::UnixStream;
use std::process::{Child, Stdio};

use serde_json::Value;

use crate::support::{MIB, Scratch, park};

/// Two disks that will not be home soon, with metrics at this address; and the event `ready`.
fn running(scratch: &Scratch, metrics: &str) -> (Child, Value) {
    scratch.disk("root.raw", 8 * MIB, &[(0, 3 << 20, 1)]);
    scratch.disk("data.raw", 16 * MIB, &[(MIB, 5 << 20, 2)]);
    scratch.run(&["capture", "db", "root=root.raw", "data=data.raw"]).ends_with(0);
    let args =
        ["live-restore", "db@latest", "r.raw", "d.raw", "--listen", "unix:s", "--limit", "40", "--json"];
    let args = [&args[..], &["--metrics", metrics]].concat();
    let mut child = scratch.command(&args).stdout(Stdio::piped()).spawn().unwrap();
    let mut line = String::new();
    BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
    let ready: Value = serde_json::from_str(&line).unwrap();
    assert_eq!(ready["event"], "ready");
    (child, ready)
}

fn end(mut child: Child) {
    park(&mut child);
}

/// The head and the body of the answer to a request.
fn ask(mut stream: impl Read + Write, request: &str) -> (String, String) {
    let _ = stream.write_all(request.as_bytes());
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    (head.to_owned(), body.to_owned())
}

fn is_name(name: &str) -> bool {
    name.starts_with(|c: char| c.is_ascii_alphabetic())
        && name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_')
}

/// Every sample by its name and labels. What promtool would refuse is refused.
fn samples(body: &str) -> HashMap<String, f64> {
    assert!(body.ends_with('\n'));
    let mut kinds: HashMap<&str, &str> = HashMap::new();
    let mut helped: HashSet<&str> = HashSet::new();
    let mut samples = HashMap::new();
    let mut last = "";
    for line in body.lines() {
        if let Some(rest) = line.strip_prefix("# HELP ") {
            let (name, help) = rest.split_once(' ').unwrap();
            assert!(is_name(name) && help.ends_with('.') && helped.insert(name), "{line}");
            continue;
        }
        if let Some(rest) = line.strip_prefix("# TYPE ") {
            let (name, kind) = rest.split_once(' ').unwrap();
            assert!(["gauge", "counter", "histogram"].contains(&kind), "{line}");
            assert!(helped.contains(name) && kinds.insert(name, kind).is_none(), "{line}");
            assert_eq!(kind == "counter", name.ends_with("_total"), "{line}");
            last = name;
            continue;
        }
        let (key, value) = line.rsplit_once(' ').unwrap_or_else(|| panic!("{line:?}"));
        let value: f64 = value.parse().unwrap_or_else(|_| panic!("{line:?}"));
        let (name, labels) = key.split_once('{').unwrap_or((key, ""));
        assert!(is_name(name) && (labels.is_empty() || labels.ends_with("\"}")), "{line}");
        let of = match kinds[last] {
            "histogram" => {
                ["_bucket", "_sum", "_count"].iter().find_map(|end| name.strip_suffix(end)).unwrap()
            }
            _ => name,
        };
        assert_eq!(of, last, "a metric's samples stand together: {line}");
        assert!(samples.insert(key.to_owned(), value).is_none(), "twice: {line}");
    }
    assert_eq!(kinds.len(), helped.len());
    samples
}

#[test]
fn metrics_are_well_formed_and_say_what_status_says() {
    let scratch = Scratch::new();
    let (child, ready) = running(&scratch, "tcp:127.0.0.1:0");
    let url = ready["metrics"].as_str().unwrap();
    let address = url.strip_prefix("http://").unwrap().strip_suffix("/metrics").unwrap();
    let get = "GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n";
    let (head, body) = ask(TcpStream::connect(address).unwrap(), get);
    assert!(head.starts_with("HTTP/1.1 200 OK\r\n"), "{head}");
    assert!(head.contains("Content-Type: text/plain; version=0.0.4"), "{head}");
    assert!(head.contains(&format!("Content-Length: {}", body.len())), "{head}");
    let samples = samples(&body);
    for (target, disk) in [("r.raw", "root"), ("d.raw", "data")] {
        let status = scratch.json(&["status", target]);
        let labels = format!("disk=\"{disk}\",snapshot=\"{}\"", status["snapshot"].as_str().unwrap());
        let of = |name: &str| samples[&format!("lifeboot_{name}{{{labels}}}")];
        assert_eq!(of("disk_size_bytes"), status["size"].as_f64().unwrap());
        assert_eq!(of("guest_bytes"), 0.0);
        assert!(of("home_bytes") > 0.0 && of("home_bytes") <= status["home_bytes"].as_f64().unwrap());
        assert_eq!(of("complete"), 0.0);
        let bucket =
            |le: &str| samples[&format!("lifeboot_miss_duration_seconds_bucket{{{labels},le=\"{le}\"}}")];
        assert!(bucket("0.001") <= bucket("1") && bucket("1") <= bucket("+Inf"));
        assert_eq!(bucket("+Inf"), of("miss_duration_seconds_count"));
    }
    assert_eq!(samples["lifeboot_agent_limit_bytes_per_second"], 40.0);
    assert_eq!(samples["lifeboot_agent_connections"], 0.0);
    let (head, _) = ask(TcpStream::connect(address).unwrap(), "GET / HTTP/1.1\r\n\r\n");
    assert!(head.starts_with("HTTP/1.1 404"), "{head}");
    end(child);
}

#[test]
fn scrapers_that_are_silent_or_huge_keep_nobody_from_metrics_and_the_agent_from_nothing() {
    let scratch = Scratch::new();
    let (child, ready) = running(&scratch, "unix:m");
    assert_eq!(ready["metrics"], "unix:m");
    let connect = || UnixStream::connect(scratch.path("m")).unwrap();
    let silent: Vec<_> = (0..40).map(|_| connect()).collect();
    // An agent that is asked otherwise does not feel it.
    assert_eq!(scratch.json(&["status", "r.raw"])["pid"], child.id());
    let mut huge = connect();
    let _ = huge.write_all(&vec![b'x'; 1 << 20]);
    drop(connect());
    let (head, body) = ask(connect(), "GET /metrics HTTP/1.1\r\n\r\n");
    assert!(head.starts_with("HTTP/1.1 200"), "{head}");
    samples(&body);
    drop(silent);
    end(child);
    assert!(!scratch.path("m").exists());
}

#[test]
fn an_address_for_metrics_that_cannot_be_had_costs_nothing() {
    let scratch = Scratch::new();
    scratch.disk("d.raw", 8 * MIB, &[(0, 3 << 20, 1)]);
    scratch.run(&["capture", "g", "d.raw"]).ends_with(0);
    let holder = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let taken = format!("tcp:{}", holder.local_addr().unwrap());
    let before = scratch.names(".");
    let args = ["live-restore", "g@latest", "t.raw", "--listen", "unix:s", "--metrics", &taken];
    scratch.run(&args).fails(&["cannot listen for scrapers", &taken, "--metrics"]);
    assert_eq!(scratch.names("."), before);
}
