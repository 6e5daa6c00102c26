package layer

// work is what a pass has to do for one node.
type work struct {
	// old is what the destination holds at this path, of the same type, and
	// still holds after the removals; nil if nothing.
	old *node
	// leader is the node whose entry carries this one's content: itself, but
	// for all but one of a group of hard links.
	leader *node
	// same: nothing moved, so the old record holds and nothing is sent.
	same   bool
	mapped bool // in AlwaysCompare, under this or another of its names
	// touched: a directory in which applying changes names, so that its times
	// must be set again even if they did not move here.
	touched bool
	// skipped: it changed under the pass and the old record stays.
	skipped bool
	// dropped: it did not reach the destination, and has no place in the index.
	dropped bool
}

// todo is the part of a plan that is not in the nodes.
type todo struct {
	removals []string
	// links are the paths to be linked to their leaders once all entries are sent.
	links []*node
}

// plan compares what is there with what the destination holds, and decides for
// each path whether its inode there stays, is patched, is replaced or becomes
// a link. It reads nothing, so the same trees give the same plan.
//
// Hard links make it more than a walk over two trees. The destination's inodes
// are objects, each with one path or more. An object is kept by at most one
// group, which is the set of paths that share an inode now; every other path
// that leads to it is removed before anything is written. So patching an object
// never shows through a name that should not see it.
func plan(since, next *Index, mapped []string) todo {
	p := &planner{since: since, next: next, groups: map[uint64]*group{}, owners: map[object]*group{}}
	next.root.work = &work{leader: next.root, old: since.root}
	p.pair(next.root)
	for _, path := range mapped {
		if n := next.root.lookup(path); n != nil && n.regular() {
			n.mapped, n.work.mapped = true, true
		}
	}
	p.collect()
	p.claim()
	p.assign()
	return p.todo
}

type planner struct {
	since, next *Index
	todo        todo
	files       []*node           // everything but directories, in walk order
	groups      map[uint64]*group // by inode number; only with two members or more
	owners      map[object]*group // of objects that have several paths
}

type group struct {
	members []*node
	object  object // kept from since; 0 is none
}

// single owns objects on behalf of files with one path; which one does not
// matter, only that the object is taken.
var single = &group{}

// pair gives every new node the old one at its path, and finds what is gone.
func (p *planner) pair(n *node) {
	var olds []*node
	if n.work.old != nil {
		olds = n.work.old.children
		n.work.same = p.unmoved(n)
	}
	i := 0
	gone := func() {
		p.todo.removals = append(p.todo.removals, olds[i].path())
		n.work.touched = true
		i++
	}
	slab := make([]work, len(n.children))
	for k, c := range n.children {
		for i < len(olds) && olds[i].name < c.name {
			gone()
		}
		c.work = &slab[k]
		c.work.leader = c
		if i < len(olds) && olds[i].name == c.name {
			if olds[i].kind() == c.kind() {
				c.work.old = olds[i]
				i++
			} else {
				gone()
			}
		}
		if c.dir() {
			n.work.touched = n.work.touched || c.work.old == nil
			p.pair(c)
		} else {
			p.files = append(p.files, c)
		}
	}
	for i < len(olds) {
		gone()
	}
}

// unmoved says that n is what was recorded, in all that lstat and ctime show.
func (p *planner) unmoved(n *node) bool {
	old := n.work.old
	if n.whiteout() || old.whiteout() {
		return n.whiteout() && old.whiteout()
	}
	return n.sameStat(old) && old.settled && !old.mapped && !p.since.suspect
}

// collect finds the groups of paths that are hard links of each other now.
func (p *planner) collect() {
	first := map[uint64]*node{}
	for _, n := range p.files {
		if n.nlink < 2 || n.whiteout() {
			continue
		}
		g := p.groups[n.ino]
		switch other := first[n.ino]; {
		case g != nil:
			if g.members[0].kind() == n.kind() {
				g.members = append(g.members, n)
			}
		case other == nil:
			first[n.ino] = n
		case other.kind() == n.kind(): // else the number was given again during the walk
			p.groups[n.ino] = &group{members: []*node{other, n}}
		}
	}
	for _, g := range p.groups {
		for _, n := range g.members {
			n.linked = true
		}
	}
}

func (p *planner) groupOf(n *node) *group {
	if !n.linked {
		return single
	}
	return p.groups[n.ino]
}

// claim gives each object of the destination to at most one group: first to
// the inode that it was made from, then to any regular file at its path,
// because what is written anew and renamed over the old often differs little.
func (p *planner) claim() {
	for _, n := range p.files {
		if old := n.work.old; old != nil && (old.ino == n.ino || n.whiteout()) && p.keepable(n) {
			p.take(n)
		}
	}
	for _, n := range p.files {
		if n.work.old != nil && n.regular() {
			p.take(n)
		}
	}
}

// keepable says whether the destination's object can become n. Content is
// patched; what has none is made anew, with all its names, once anything moved.
func (p *planner) keepable(n *node) bool {
	if n.regular() {
		return true
	}
	if !n.linked {
		return p.unmoved(n)
	}
	members := p.groups[n.ino].members
	for _, m := range members {
		if m.work.old == nil || !p.unmoved(m) || m.work.old.object != members[0].work.old.object {
			return false
		}
	}
	return true
}

func (p *planner) take(n *node) {
	g, obj := p.groupOf(n), n.work.old.object
	if g != single && g.object != 0 {
		return
	}
	if n.work.old.linked {
		if p.owners[obj] != nil {
			return
		}
		p.owners[obj] = g
	}
	if g != single {
		g.object = obj
	} else {
		n.object = obj
	}
}

// assign turns claims into work: what must go first, who leads, who is linked.
func (p *planner) assign() {
	for _, n := range p.files {
		if !n.linked {
			p.settle(n, n.object)
			n.work.same = n.work.old != nil && p.unmoved(n) && !n.work.mapped
		}
	}
	for _, n := range p.files { // not over the map: the stream must not depend on its order
		if !n.linked || p.groups[n.ino].members[0] != n {
			continue
		}
		g := p.groups[n.ino]
		leader, mapped := n, false
		for i := len(g.members) - 1; i >= 0; i-- {
			m := g.members[i]
			mapped = mapped || m.work.mapped
			if old := m.work.old; old != nil && g.object != 0 && old.object == g.object {
				leader = m
			}
		}
		p.settle(leader, g.object)
		leader.work.mapped = mapped
		leader.work.same = leader.work.old != nil && p.unmoved(leader) && !mapped
		for _, m := range g.members {
			if m == leader {
				continue
			}
			m.work.leader, m.mapped = leader, mapped
			p.settle(m, g.object)
			m.object = leader.object
			if m.work.old == nil {
				p.todo.links = append(p.todo.links, m)
			}
		}
		leader.mapped = mapped
	}
}

// settle keeps what the destination has at n's path if it is the object kept,
// and has it removed otherwise.
func (p *planner) settle(n *node, kept object) {
	old := n.work.old
	if old != nil && kept != 0 && old.object == kept {
		n.object = kept
		return
	}
	if old != nil {
		p.todo.removals = append(p.todo.removals, n.path())
		n.work.old = nil
	}
	n.parent.work.touched = true
	p.next.nextObject++
	n.object = p.next.nextObject
}
