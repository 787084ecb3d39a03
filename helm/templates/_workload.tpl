{{/* What a track's values come to: dict with models, settings, image, replicas, as JSON. */}}
{{- define "kiln.values" -}}
{{- $v := .root.Values }}
{{- $values := dict "models" $v.models "settings" $v.settings "image" $v.image "replicas" $v.replicas }}
{{- if eq .track "canary" }}
{{- /* A digest goes before a tag, so that of the other image must not stay. */}}
{{- $digest := ternary (dict "digest" "") dict (not (empty $v.canary.image)) }}
{{- $_ := set $values "image" (mustMergeOverwrite (deepCopy $v.image) $digest $v.canary.image) }}
{{- $_ := set $values "models" (mustMergeOverwrite (deepCopy $v.models) $v.canary.models) }}
{{- $_ := set $values "settings" (mustMergeOverwrite (deepCopy $v.settings) $v.canary.settings) }}
{{- $_ := set $values "replicas" $v.canary.replicas }}
{{- end }}
{{- toJson $values }}
{{- end -}}

{{- define "kiln.config" -}}
{{- $values := include "kiln.values" . | fromJson -}}
apiVersion: v1
kind: ConfigMap
metadata:
  name: {{ include "kiln.trackName" . }}
  labels: {{- include "kiln.labels" .root | nindent 4 }}
data:
  kiln.yaml: |
    {{- toYaml $values.settings | nindent 4 }}
  models.yaml: |
    {{- toYaml (dict "models" $values.models) | nindent 4 }}
{{- end -}}

{{- define "kiln.deployment" -}}
{{- $v := .root.Values }}
{{- $values := include "kiln.values" . | fromJson -}}
apiVersion: apps/v1
kind: Deployment
metadata:
  name: {{ include "kiln.trackName" . }}
  labels:
    {{- include "kiln.labels" .root | nindent 4 }}
    app.kubernetes.io/component: {{ .track }}
spec:
  {{- if or (eq .track "canary") (not (or $v.autoscaling.enabled $v.keda.enabled)) }}
  replicas: {{ $values.replicas }}
  {{- end }}
  strategy: {{- toYaml $v.strategy | nindent 4 }}
  progressDeadlineSeconds: {{ $v.progressDeadlineSeconds | int }}
  selector:
    matchLabels: {{- include "kiln.selector" . | nindent 6 }}
  template:
    metadata:
      labels:
        {{- with $v.podLabels }}{{ toYaml . | nindent 8 }}{{ end }}
        {{- include "kiln.labels" .root | nindent 8 }}
        app.kubernetes.io/component: {{ .track }}
      annotations:
        # Settings are read at the start only; models.yaml is read again when it changes.
        checksum/settings: {{ toYaml $values.settings | sha256sum }}
        {{- with $v.podAnnotations }}{{ toYaml . | nindent 8 }}{{ end }}
    spec:
      terminationGracePeriodSeconds: {{ include "kiln.grace" .root }}
      serviceAccountName: {{ include "kiln.serviceAccount" .root }}
      automountServiceAccountToken: false
      enableServiceLinks: false
      securityContext: {runAsNonRoot: true, runAsUser: 10001, runAsGroup: 10001, fsGroup: 10001, fsGroupChangePolicy: OnRootMismatch, seccompProfile: {type: RuntimeDefault}}
      {{- with $v.imagePullSecrets }}
      imagePullSecrets: {{- toYaml . | nindent 8 }}
      {{- end }}
      {{- with $v.gpu.runtimeClassName }}
      runtimeClassName: {{ . }}
      {{- end }}
      {{- with $v.priorityClassName }}
      priorityClassName: {{ . }}
      {{- end }}
      {{- with include "kiln.placement" .root | trim }}{{ . | nindent 6 }}{{ end }}
      {{- if or $v.topologySpread.hosts $v.topologySpread.zones }}
      topologySpreadConstraints:
        {{- $selector := include "kiln.selector" . }}
        {{- range $key, $unsatisfiable := dict "kubernetes.io/hostname" $v.topologySpread.hosts "topology.kubernetes.io/zone" $v.topologySpread.zones }}
        {{- if $unsatisfiable }}
        - topologyKey: {{ $key }}
          maxSkew: 1
          whenUnsatisfiable: {{ $unsatisfiable }}
          matchLabelKeys: [pod-template-hash]
          labelSelector:
            matchLabels: {{- $selector | nindent 14 }}
        {{- end }}
        {{- end }}
      {{- end }}
      containers:
        - name: kiln
          image: {{ include "kiln.image" (dict "root" .root "image" $values.image) | quote }}
          imagePullPolicy: {{ $values.image.pullPolicy }}
          args:
            - serve
            - {{ $v.source.url | default "/models" | quote }}
            - --config=/etc/kiln/kiln.yaml
            - --models-config=/etc/kiln/models.yaml
            - --cache-dir=/cache
            - --drain-s={{ $v.drainSeconds }}
            - --rest-port=8501
            - --grpc-port=8500
          ports:
            - {name: http, containerPort: 8501}
            - {name: grpc, containerPort: 8500}
          {{- include "kiln.container" (dict "root" .root "port" "http") | nindent 10 }}
          volumeMounts:
            - {name: config, mountPath: /etc/kiln, readOnly: true}
            {{- with $v.source }}
            {{- if or .claim.name .image.reference }}
            - name: models
              mountPath: /models
              readOnly: true
              {{- with ternary .claim.subPath .image.subPath (not (empty .claim.name)) }}
              subPath: {{ . }}
              {{- end }}
            {{- end }}
            {{- end }}
            {{- include "kiln.mounts" .root | nindent 12 }}
      volumes:
        - name: config
          configMap: {name: {{ include "kiln.trackName" . }}}
        {{- with $v.source.claim.name }}
        - name: models
          persistentVolumeClaim: {claimName: {{ . }}, readOnly: true}
        {{- end }}
        {{- with $v.source.image }}
        {{- if .reference }}
        - name: models
          image: {reference: {{ .reference | quote }}, pullPolicy: {{ .pullPolicy }}}
        {{- end }}
        {{- end }}
        {{- include "kiln.volumes" .root | nindent 8 }}
{{- end -}}
