//! Help, completions, man pages, and the ways of talking.

use crate::support::{MIB, Ran, Scratch};

#[test]
fn every_verb_has_help_a_man_page_and_a_completion() {
    let scratch = Scratch::empty();
    let written = scratch.json(&["man", "pages"]);
    let pages = scratch.names("pages");
    assert_eq!(written.as_array().unwrap().len(), pages.len());
    let bash = scratch.run(&["completions", "bash"]).ends_with(0).stdout;
    for verb in
        ["init", "capture", "snapshots", "show", "restore", "live-restore", "status", "serve", "verify"]
    {
        assert!(pages.contains(&format!("lifeboot-{verb}.1")), "{pages:?}");
        assert!(bash.contains(verb));
        let help = scratch.run(&[verb, "--help"]).ends_with(0).stdout;
        assert!(help.contains("--repo") && help.contains("--json"), "{help}");
        let page = std::fs::read_to_string(scratch.path("pages").join(format!("lifeboot-{verb}.1"))).unwrap();
        assert!(page.contains(".TH") && page.contains("repo"), "{page}");
    }
    for shell in ["zsh", "fish"] {
        assert!(scratch.run(&["completions", shell]).ends_with(0).stdout.contains("lifeboot"));
    }
    let version = scratch.run(&["--version"]).ends_with(0).stdout;
    assert!(version.starts_with("lifeboot "), "{version}");
    assert!(scratch.run(&["--help"]).ends_with(0).stdout.contains("Exit codes"));
}

#[test]
fn the_arguments_of_boots_qemu_stand_among_its_arguments() {
    let help = Scratch::empty().run(&["boot", "--help"]).ends_with(0).stdout;
    let place = |text: &str| help.find(text).unwrap_or_else(|| panic!("no {text}: {help}"));
    assert!(place("\nArguments:") < place("  [QEMU ARGUMENTS]..."), "{help}");
    assert!(place("  [QEMU ARGUMENTS]...") < place("\nOptions:"), "{help}");
    assert!(place("\nOptions:") < place("\nSource options:"), "{help}");
}

#[test]
fn quiet_says_nothing_and_json_says_only_json() {
    let scratch = Scratch::new();
    scratch.disk("d.raw", MIB, &[(0, 1000, 1)]);
    let quiet = scratch.run(&["capture", "g", "d.raw", "-q"]).ends_with(0);
    assert_eq!((quiet.stdout.as_str(), quiet.stderr.as_str()), ("", ""));
    let ran = scratch.run(&["capture", "g", "d.raw", "--json"]).ends_with(0);
    assert!(ran.json()["snapshot"].as_str().unwrap().starts_with("g@"));
    for line in ran.stderr.lines() {
        let event: serde_json::Value = serde_json::from_str(line).unwrap();
        assert_eq!(event["event"], "progress");
    }
    let ran = scratch.run(&["show", "nothing@latest", "--json"]).ends_with(1);
    let event: serde_json::Value = serde_json::from_str(&ran.stderr).unwrap();
    assert_eq!((event["event"].as_str(), event["exit_code"].as_i64()), (Some("error"), Some(1)));
    assert_eq!(ran.stdout, "");
}

#[test]
fn an_error_says_what_failed_on_what_and_what_to_do() {
    let scratch = Scratch::empty();
    let ran = scratch.run(&["verify"]).ends_with(1);
    assert_eq!(
        ran.stderr,
        "lifeboot: there is no such repository (repo); look at the path, and whether its file system is mounted\n"
    );
}

#[test]
fn an_empty_variable_names_no_repository_and_is_in_nobodys_way() {
    let scratch = Scratch::new();
    let run = |args: &[&str]| {
        let mut command = scratch.command(args);
        Ran::of(command.env("LIFEBOOT_REPO", "").output().unwrap())
    };
    for args in [["-r", "repo", "snapshots"], ["snapshots", "-r", "repo"]] {
        run(&args).ends_with(0);
    }
    run(&["snapshots"]).ends_with(2).tells(&["no repository was named", "LIFEBOOT_REPO"]);
    run(&["snapshots", "--repo", ""]).ends_with(2).tells(&["no repository was named"]);
    run(&["status", "nothing.raw"]).fails(&["no live-restore to nothing.raw is known"]);
}
