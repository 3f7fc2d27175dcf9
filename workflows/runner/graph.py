"""Edit an API graph and its UI workflow together, so that a saved video restores the graph that made it."""

WIDGETS = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")


def find_node(graph, class_type):
    """Id of the only node of this class. Raises KeyError if there is none or more than one."""
    found = [i for i, node in graph.items() if node["class_type"] == class_type]
    if len(found) != 1:
        raise KeyError(f"the graph has {len(found)} nodes of class {class_type}, expected one")
    return found[0]


def widget_names(schema):
    """Names of a node's widgets in the order of the UI format's widgets_values (schema: its /object_info entry)."""
    names = []
    for section in ("required", "optional"):
        for name, (kind, *rest) in schema["input"].get(section, {}).items():
            options = rest[0] if rest else {}
            if (kind in WIDGETS or isinstance(kind, list)) and not options.get("forceInput"):
                names.append(name)
                if options.get("control_after_generate"):
                    names.append(f"{name} control")
    return names


def set_inputs(graph, workflow, schemas, node_id, **values):
    """Set a node's inputs in the API graph and, if there is one, in the UI workflow; None leaves a value unchanged.
    Raises KeyError for an input that the node does not have."""
    class_type = graph[node_id]["class_type"]
    names = widget_names(schemas[class_type])
    for name, value in values.items():
        if value is None:
            continue
        if name not in names:
            raise KeyError(f"{class_type} has no widget {name!r}; it has {names}")
        graph[node_id]["inputs"][name] = value
        for node in (workflow or {"nodes": []})["nodes"]:
            if str(node["id"]) == node_id and node["type"] == class_type:
                node["widgets_values"][names.index(name)] = value
