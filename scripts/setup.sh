#!/usr/bin/env bash
# Prepares a Debian machine for building, testing and trying tranship. Run it
# again at any time: what is there is left alone, and nothing of the system is
# upgraded, pinned or started.
#
#   scripts/setup.sh            what build, tests, lab and demo need
#   scripts/setup.sh generate   also what `make generate` needs
set -euo pipefail

# The oldest CRIU that can do what tranship asks of it, and the first that
# nobody has tried yet. Linux 6.16 refuses SO_PASSCRED on TCP sockets, which
# only CRIU 4.2 takes; `criu check` does not notice.
criu_oldest=4.1.1
if [ "$(printf '%s\n' 6.16 "$(uname -r)" | sort -V | head -1)" = 6.16 ]; then criu_oldest=4.2; fi
criu_untried=4.3
# Suites of Debian to take CRIU from when the machine's own is too old for its
# kernel: the newest first, then the stable one.
criu_suites=${TRANSHIP_CRIU_SUITES:-sid trixie}
criu_home=${TRANSHIP_CRIU_HOME:-/usr/local/lib/tranship/criu}

say() { printf 'setup: %s\n' "$*" >&2; }
die() { say "$*"; exit 1; }

scratch=$(mktemp -d)
policy=""
cleanup() {
	rm -rf "$scratch"
	if [ -n "$policy" ]; then rm -f "$policy"; fi
}
trap cleanup EXIT

check_machine() {
	[ "$(id -u)" = 0 ] || die "needs root: sudo make setup"
	[ "$(uname -s)" = Linux ] || die "needs Linux"
	command -v apt-get >/dev/null || die "knows Debian and its relatives only; see the list of packages in $0"
	command -v go >/dev/null || die "needs Go on the PATH, $(awk '/^go /{print $2}' go.mod) or newer: https://go.dev/dl"
}

# --- packages -----------------------------------------------------------------

packages() {
	# The hosts: containers, their network, and what inspects them.
	echo containerd runc containernetworking-plugins nftables iproute2 procps
	# Building: versions come from git, the race detector needs a C compiler.
	echo git make gcc libc6-dev ca-certificates
	# CRIU from another suite is fitted with its own loader.
	echo patchelf
	# Real services for tests and the demo.
	echo redis-server redis-tools postgresql python3 iputils-ping
	# Loads, and what scrapes metrics, for the tests of profiles.
	echo stress-ng fio iperf3 prometheus curl linux-perf
	if [ "${1:-}" = generate ]; then echo clang llvm libbpf-dev protobuf-compiler; fi
}

installed() { [ "$(dpkg-query -W -f '${db:Status-Status}' "$1" 2>/dev/null)" = installed ]; }

install_packages() {
	local missing=() services=() p
	for p in $(packages "$@"); do
		installed "$p" || missing+=("$p")
	done
	[ ${#missing[@]} -gt 0 ] || return 0
	for p in redis-server postgresql prometheus; do
		[[ " ${missing[*]} " != *" $p "* ]] || services+=("$p")
	done
	say "installing ${missing[*]}"
	hold_services
	export DEBIAN_FRONTEND=noninteractive
	apt-get update -q >&2
	apt-get install -y -q --no-install-recommends "${missing[@]}" >&2
	# Tests start their own; a database that runs from the next boot on is not
	# what anybody asked for.
	if [ ${#services[@]} -gt 0 ] && [ -d /run/systemd/system ]; then
		systemctl disable --now "${services[@]}" >&2
	fi
}

# hold_services keeps packages from starting services while they are installed,
# unless the machine has such a rule already.
hold_services() {
	local rule=/usr/sbin/policy-rc.d
	[ ! -e $rule ] || return 0
	policy=$rule
	printf '#!/bin/sh\nexit 101\n' >$rule
	chmod 755 $rule
}

# --- CRIU -----------------------------------------------------------------------

version_of() { "$1" --version 2>/dev/null | awk '/^Version:/{print $2}'; }

# works VERSION-OR-"" PROGRAM: new enough, and this kernel is one that it knows.
works() {
	local v
	v=$(version_of "$1") || return 1
	[ -n "$v" ] && dpkg --compare-versions "$v" ge "$criu_oldest" && "$1" check >/dev/null 2>&1
}

tried() { dpkg --compare-versions "$1" ge "$criu_oldest" && dpkg --compare-versions "$1" lt "$criu_untried"; }

install_criu() {
	local at
	if works "$criu_home/criu"; then
		at=$criu_home/criu
	elif at=$(command -v criu) && works "$at"; then
		:
	elif distribution_criu && at=$(command -v criu) && works "$at"; then
		:
	else
		private_criu
		at=$criu_home/criu
	fi
	# runc looks for criu by name on containerd's PATH.
	if [ "$at" = $criu_home/criu ] && [ ! -e /usr/local/sbin/criu ]; then
		ln -s $criu_home/criu /usr/local/sbin/criu
	fi
	say "CRIU $(version_of "$at") in $at"
}

# distribution_criu installs the distribution's, if that is new enough. Its
# kernel may still be newer than that CRIU knows; then another has to be found.
distribution_criu() {
	dpkg --compare-versions "$(candidate criu)" ge "$criu_oldest" || return 1
	installed criu && return 0
	say "installing criu"
	DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends criu >&2
}

candidate() { apt-cache "${@:2}" policy "$1" 2>/dev/null | awk '/Candidate:/{print ($2 == "(none)" ? "0" : $2)}'; }

# private_criu takes CRIU with all its libraries from another suite and puts
# them where nothing else finds them.
private_criu() {
	local suite source
	debian_sources >"$scratch/sources"
	[ -s "$scratch/sources" ] || die "no Debian archive is configured; install CRIU $criu_oldest or newer yourself"
	for suite in $criu_suites; do
		while read -r source; do
			say "trying CRIU of Debian $suite"
			if fetch_criu "$suite" "$source" && fit_criu; then return 0; fi
		done <"$scratch/sources"
	done
	die "no CRIU of $criu_suites works on this kernel; install CRIU $criu_oldest or newer yourself"
}

# debian_sources prints the machine's own archives, whatever mirror that is, as
# "URI KEYRING": those that serve the machine's release from the main component.
debian_sources() {
	local release files f
	release=$(. /etc/os-release && echo "${VERSION_CODENAME:-}")
	[ -n "$release" ] || return 0
	files=$(ls /etc/apt/sources.list /etc/apt/sources.list.d/*.list 2>/dev/null) || true
	# deb [options] URI suite component…
	[ -z "$files" ] || awk -v release="$release" '
		$1 != "deb" { next }
		{
			key = "-"; i = 2
			if ($2 ~ /^\[/) {
				for (;; i++) {
					o = $i; gsub(/[][]/, "", o)
					if (o ~ /^signed-by=/) key = substr(o, 11)
					if ($i ~ /\]$/) { i++; break }
				}
			}
			if ($(i + 1) != release) next
			for (c = i + 2; c <= NF; c++) if ($c == "main") print $i, key
		}' $files
	for f in $(ls /etc/apt/sources.list.d/*.sources 2>/dev/null); do
		# Stanzas are separated by blank lines; comments may stand inside.
		grep -v '^#' "$f" | awk -v release="$release" '
			BEGIN { RS = ""; FS = "\n" }
			{
				split("", v)
				for (i = 1; i <= NF; i++) {
					n = index($i, ":")
					if (n > 1 && $i !~ /^[ \t]/) v[tolower(substr($i, 1, n - 1))] = substr($i, n + 1)
				}
				if (tolower(v["enabled"]) ~ /no|false/) next
				if ((" " v["suites"] " ") !~ (" " release " ")) next
				if ((" " v["components"] " ") !~ / main / || (" " v["types"] " ") !~ / deb /) next
				key = v["signed-by"]; gsub(/[ \t]/, "", key)
				split(v["uris"], uri, " ")
				print uri[1], (key ~ /^\// ? key : "-")
			}'
	done
}

# fetch_criu SUITE "URI KEYRING": an apt of its own, with its own lists, cache
# and an empty list of installed packages, so that it fetches CRIU's whole
# closure, and the machine's apt never hears of the other suite. A mirror may be
# weeks behind sid, whose index is valid for a few days; its signature is what
# counts here.
fetch_criu() {
	local suite=$1 uri key options="" apt v
	read -r uri key <<<"$2"
	[ "$key" = - ] || options="[signed-by=$key] "
	rm -rf "$scratch/apt"
	mkdir -p "$scratch"/apt/{state/lists/partial,cache/archives/partial,root}
	: >"$scratch/apt/status"
	echo "deb ${options}$uri $suite main" >"$scratch/apt/sources.list"
	apt=(-o "Dir::Etc::sourcelist=$scratch/apt/sources.list" -o Dir::Etc::sourceparts=- -o Dir::Etc::preferences=- -o Dir::Etc::preferencesparts=-
		-o "Dir::State=$scratch/apt/state" -o "Dir::State::status=$scratch/apt/status" -o "Dir::Cache=$scratch/apt/cache"
		-o APT::Default-Release= -o APT::Sandbox::User=root -o Acquire::Languages=none -o Acquire::Check-Valid-Until=false)
	apt-get "${apt[@]}" update -q >"$scratch/apt.log" 2>&1 || { tail -3 "$scratch/apt.log" >&2; return 1; }
	v=$(candidate criu "${apt[@]}")
	tried "${v:-0}" || { say "$suite has CRIU ${v:-not at all}, which is not between $criu_oldest and $criu_untried"; return 1; }
	apt-get "${apt[@]}" install -y -q --no-install-recommends --download-only criu >"$scratch/apt.log" 2>&1 || { tail -3 "$scratch/apt.log" >&2; return 1; }
}

# fit_criu unpacks what CRIU loads and has the program load exactly that. The
# libraries, and libc above all, are left as they are: patching breaks them.
fit_criu() {
	local deb root=$scratch/apt/root new lib interp program libs
	for deb in "$scratch"/apt/cache/archives/*.deb; do dpkg-deb -x "$deb" "$root"; done
	program=$root/usr/sbin/criu
	[ -x "$program" ] || return 1
	lib=usr/lib/$(dpkg-architecture -qDEB_HOST_MULTIARCH 2>/dev/null || gcc -print-multiarch)
	interp=$(patchelf --print-interpreter "$program")
	# usr-merged: /lib64/ld-… is found below usr/lib/ARCH or usr/lib64.
	for libs in "$lib" usr/lib64 usr/lib lib64 lib; do
		if [ -e "$root/$libs/$(basename "$interp")" ]; then interp=$libs/$(basename "$interp"); break; fi
	done
	new=$criu_home/root.new
	rm -rf "$new"
	mkdir -p "$new/usr/sbin"
	copy_closure "$root" "$new" "$program" "$lib" "$interp"
	mkdir -p "$criu_home"
	cp "$program" "$criu_home/criu.new"
	# The final names are in the program, so directories change places first.
	patchelf --force-rpath --set-rpath "$criu_home/root/$lib" --set-interpreter "$criu_home/root/$interp" "$criu_home/criu.new"
	rm -rf "$criu_home/root.old"
	[ ! -e "$criu_home/root" ] || mv "$criu_home/root" "$criu_home/root.old"
	mv "$new" "$criu_home/root"
	mv "$criu_home/criu.new" "$criu_home/criu"
	rm -rf "$criu_home/root.old"
	works "$criu_home/criu" || { say "it does not work here: $("$criu_home/criu" check 2>&1 | tail -2)"; rm -f "$criu_home/criu"; return 1; }
}

# copy_closure ROOT NEW PROGRAM LIB INTERP copies the loader and the libraries
# that the program names, and those that they name, a few MB of the whole.
copy_closure() {
	local root=$1 new=$2 lib=$4 interp=$5 todo=("$3") file name
	mkdir -p "$new/$lib" "$new/$(dirname "$interp")"
	cp -L "$root/$interp" "$new/$interp"
	while [ ${#todo[@]} -gt 0 ]; do
		file=${todo[0]}
		todo=("${todo[@]:1}")
		for name in $(patchelf --print-needed "$file"); do
			[ ! -e "$new/$lib/$name" ] || continue
			[ -e "$root/$lib/$name" ] || die "CRIU's library $name is missing from what was fetched"
			cp -L "$root/$lib/$name" "$new/$lib/$name"
			todo+=("$new/$lib/$name")
		done
	done
}

# --- kernel ---------------------------------------------------------------------

# A pipe carries CRIU's page references; without CAP_SYS_RESOURCE (a nested
# machine) it is held to this limit, and a gigabyte takes three times as long.
widen_pipes() {
	local limit=/proc/sys/fs/pipe-max-size want=8388608
	[ "$(cat $limit)" -lt $want ] || return 0
	if [ $((0x$(awk '/^CapEff/{print $2}' /proc/self/status) >> 24 & 1)) = 0 ]; then
		echo $want >$limit && say "fs.pipe-max-size is $want until the next boot"
	fi
}

cd "$(dirname "$0")/.."
check_machine
install_packages "$@"
install_criu
widen_pipes
go mod download
say "ready"
