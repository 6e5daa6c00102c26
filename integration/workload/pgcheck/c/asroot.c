/*
 * LD_PRELOAD for PostgreSQL as root: it says another user id than 0.
 *
 * CRIU reads the limits of other users' processes with prlimit(2), which needs
 * CAP_SYS_RESOURCE. A machine whose root lacks it (some sandboxes) can migrate
 * root's processes only, and PostgreSQL refuses to be one of them.
 */
#include <stdlib.h>
#include <sys/types.h>

static uid_t pretended(void)
{
	const char *uid = getenv("PGCHECK_UID");
	return uid ? (uid_t)atoi(uid) : 5432;
}

uid_t getuid(void) { return pretended(); }
uid_t geteuid(void) { return pretended(); }
